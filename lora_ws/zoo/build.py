"""Build a whole collection: one share in this process, or several in processes of their own."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_ws import journal
from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.store import JOURNAL, QUARANTINE, StoreWriter, partial_path
from lora_ws.config import parse_shard
from lora_ws.errors import DataError, LoraWsError, TrainingError
from lora_ws.report.progress import progress
from lora_ws.workers import current_engine
from lora_ws.zoo.share import build_share
from lora_ws.zoo.spec import ZooSpec

# Rows copied at once when shares are joined.
BLOCK = 1000


def build_zoo(spec: ZooSpec) -> AdapterSet:
    """Train a collection of adapters, or go on with one that was cut off.

    Raises:
        ConfigError: photos and recipe do not fit.
        DataError: ``out`` exists, or an unfinished store of another recipe is in its place.
        TrainingError: a process ended early; what was finished is kept.
    """
    if spec.processes == 1:
        return build_share(spec)
    if spec.path.exists():
        raise DataError(f"{spec.path} exists already; choose another place or remove it")
    parts = spec.parts()
    _run([part for part in parts if not part.path.exists()])
    adapters = merge_shares([part.path for part in parts], spec.path, spec.shard)
    for part in parts:
        shutil.rmtree(part.path)
    return adapters


def merge_shares(shares: Sequence[Path], out: Path, shard: str = "0/1") -> AdapterSet:
    """Join stores of shares, in the order of an undivided build.

    Args:
        shares: stores that together are the whole of ``shard``.
        out: store to make.
        shard: what they make: by default the collection.

    Raises:
        DataError: they are not all shares of one collection, or ``out`` exists.
    """
    stores = [AdapterSet.open(share) for share in shares]
    origin = _common_origin(stores, shares, shard)
    numbers = np.concatenate([store.column("number") for store in stores])
    member = np.repeat(np.arange(len(stores)), [len(store) for store in stores])
    row = np.concatenate([np.arange(len(store)) for store in stores])
    table = pa.concat_tables([store.rows for store in stores], promote_options="permissive")
    lost = [entry for share in shares for entry in journal.read(share / QUARANTINE)]
    order = np.argsort(numbers)
    with StoreWriter(Path(out), stores[0].layout, stores[0].card, origin) as writer:
        for start in range(writer.rows, len(order), BLOCK):
            block = order[start : start + BLOCK]
            weights = np.stack([stores[member[k]].weights[row[k]] for k in block])
            writer.append(weights, table.take(block), lost if start == 0 else ())
        writer.finish()
    return AdapterSet.open(out)


def _common_origin(
    stores: Sequence[AdapterSet], shares: Sequence[Path], shard: str
) -> dict[str, Any]:
    """What an undivided build would record; refuses what does not belong together."""
    origins = []
    for store, share in zip(stores, shares, strict=True):
        recipe = dict(store.manifest.get("recipe", {}))
        if "shard" not in recipe:
            raise DataError(f"{share} was not made by `lora-ws zoo build`; expected its shares")
        origins.append((recipe.pop("shard"), recipe, store.manifest["base"]))
    (first, step), count = parse_shard(shard), parse_shard(origins[0][0])[1]
    wanted = {f"{k}/{count}" for k in range(first, count, step)}
    for share, (_, recipe, base) in zip(shares, origins, strict=True):
        if (recipe, base) != origins[0][1:]:
            raise DataError(f"{share} is a share of another collection than {shares[0]}")
    if missing := sorted(wanted - {shard for shard, _, _ in origins}):
        raise DataError(f"expected all {len(wanted)} shares; missing: {', '.join(missing)}")
    if len(origins) != len(wanted):
        raise DataError(f"expected {len(wanted)} shares, got {len(origins)}: one is named twice")
    recipe = origins[0][1] | {"shard": shard}
    return stores[0].origin | {"recipe": recipe}


def _run(parts: Sequence[ZooSpec]) -> None:
    """Build shares in processes of their own, until all are done or one fails."""
    with progress("train adapters", None) as advance:
        shown = 0

        def tick() -> None:
            nonlocal shown
            done = sum(_finished(part) for part in parts)
            advance(max(0, done - shown))
            shown = max(shown, done)

        try:
            current_engine().work_through(_build_share, parts, len(parts), tick)
        except TrainingError as error:
            kept = ". What was finished is kept; run the same command again to go on"
            raise TrainingError(f"{error}{kept}") from error


def _build_share(part: ZooSpec) -> None:
    try:
        build_share(part)
    except LoraWsError as error:
        raise TrainingError(f"share {part.shard}: {error}") from error


def _finished(part: ZooSpec) -> int:
    """Adapters of a share that are safe so far."""
    try:
        return sum(line["rows"] for line in journal.read(partial_path(part.path) / JOURNAL)[1:])
    except FileNotFoundError:  # finished, and renamed, between two looks
        return 0
