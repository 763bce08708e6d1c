"""Import a collection: any source becomes a store, streaming, resumable, nothing lost unsaid."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from lora_ws.adapters.layout import Layout, natural_key
from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.addressed import on_disk
from lora_ws.collection.card import DatasetCard
from lora_ws.collection.facts import local_facts
from lora_ws.collection.files_source import CATEGORY, FilesSource
from lora_ws.collection.parquet_source import ParquetSource, missing_shards
from lora_ws.collection.source import Batch, ImportSource, Problem, common_parent
from lora_ws.collection.store import StoreWriter, row_hashes
from lora_ws.errors import DataError
from lora_ws.report.progress import progress

OnError = Literal["raise", "skip"]


def import_collection(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    card: DatasetCard | None = None,
    layout: Layout | None = None,
    project: bool = False,
    min_energy: float = 0.0,
    on_error: OnError = "raise",
    origin: Mapping[str, Any] | None = None,
) -> AdapterSet:
    """Import parquet files or folders of adapters into a store.

    Memory does not grow with the collection. An import that was cut off continues where it
    stopped when it is called again in the same way.

    Args:
        paths: parquet files, adapter files, or folders of either; or addresses of fsspec of such,
            which are copied into the cache first.
        out: folder of the new store.
        card: what the collection is; by default one named like the folder, whose label is the
            column ``label`` of a table, the sub-folder, or what stands beside the files.
        layout: the layout that every row must have; by default the card's, else the first row's.
        project: bring adapter files of other ranks and modules into the layout, by default the one
            that most files have in common, with columns ``retained_energy``, ``layers_missing`` and
            ``layer_mask``, which layers of the layout a file adapts.
        min_energy: share of the squared norm of an update that has to fit the layout.
        on_error: "raise" stops at the first row that cannot be imported; "skip" lists such rows
            in ``quarantine.jsonl`` and goes on.
        origin: facts to record in the manifest, such as the Hub commit.

    Raises:
        DataError: a row is missing a column, has another shape or rank, holds NaN or infinity, or
            repeats another row; or a file is damaged. The message names file, row and column.

    Example:
        >>> from importlib.resources import files
        >>> from tempfile import TemporaryDirectory
        >>> folder = files("lora_ws") / "_assets/digit_testbed"
        >>> with TemporaryDirectory() as out:
        ...     adapters = import_collection(str(folder), Path(out) / "store")
        ...     adapters.weights.shape
        (11, 34944)
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    out = Path(out)
    paths = [on_disk(path) for path in listed]
    source = find_source(paths, card or DatasetCard(name=out.name))
    if card and (facts := local_facts(card, paths)):
        source = replace(source, facts=facts)
    if project and not isinstance(source, FilesSource):
        raise DataError("--project: expected adapter files, got parquet files of one layout")
    if isinstance(source, FilesSource):
        source = replace(source, project=project, min_energy=min_energy)
    card = card or DatasetCard(name=out.name, label=source.label_column or CATEGORY)
    return import_source(source, out, card, layout, on_error=on_error, origin=origin)


def import_source(
    source: ImportSource,
    out: Path,
    card: DatasetCard,
    layout: Layout | None = None,
    *,
    on_error: OnError = "raise",
    origin: Mapping[str, Any] | None = None,
) -> AdapterSet:
    """Import what a source holds into a store; see `import_collection`."""
    total = source.count()
    if card.rows and total != card.rows:
        said = f"card `{card.name}` says {card.rows} rows, the files hold {total}"
        warnings.warn(said, stacklevel=2)
    if layout is None:
        layout = Layout.known(card.layout) if card.layout else source.find_layout()
        layout = layout.at_rank(card.rank) if card.rank else layout
    facts = {**(origin or {}), "source": source.identity()}
    with StoreWriter(out, layout, card, facts) as writer:
        if writer.quarantine and on_error == "raise":
            raise DataError(
                f"{out} was begun with --on-error skip and has listed "
                f"{len(writer.quarantine)} entries aside: go on with it, or remove {out}.partial"
            )
        seen = _seen(writer)
        done = writer.rows + sum(entry["rows_lost"] for entry in writer.quarantine)
        with progress(f"import {card.name}", total, done) as advance:
            for batch in source.batches(layout, writer.batches):
                read = len(batch.weights) + sum(p.rows_lost for p in batch.problems)
                batch = _without_repeats(batch, seen)
                if batch.problems and on_error == "raise":
                    raise DataError(
                        f"{batch.problems[0]}. No store was made: correct the source, or list such "
                        "rows aside with --on-error skip"
                    )
                writer.append(batch.weights, batch.rows, [asdict(p) for p in batch.problems])
                advance(read)
        writer.finish()
    return AdapterSet.open(out)


def _seen(writer: StoreWriter) -> dict[str, str]:
    """Content hash -> source of the rows imported before an interruption."""
    seen: dict[str, str] = {}
    for part in writer.parts(["sha256", "source"]):
        seen |= zip(part["sha256"].to_pylist(), part["source"].to_pylist(), strict=True)
    return seen


def _without_repeats(batch: Batch, seen: dict[str, str]) -> Batch:
    """Hash every row; rows whose content was seen before become problems."""
    if not len(batch.weights):
        return batch
    hashes, keep, problems = row_hashes(batch.weights), [], list(batch.problems)
    for digest, source in zip(hashes, batch.rows["source"].to_pylist(), strict=True):
        twin = seen.setdefault(digest, source)
        keep.append(twin is source)
        if twin is not source:
            problems.append(Problem(source, f"repeats the weights of {twin}"))
    mask = np.array(keep)
    rows = batch.rows.append_column("sha256", pa.array(hashes))
    if mask.all():
        return Batch(batch.weights, rows, problems)
    return Batch(batch.weights[mask], rows.filter(pa.array(mask)), problems)


def find_source(paths: Sequence[Path], card: DatasetCard) -> FilesSource | ParquetSource:
    """Choose the importer for what is at ``paths``: parquet files, or folders of adapters.

    Raises:
        DataError: there is nothing to import.
    """
    parquet: list[Path] = []
    adapters: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        tables, files = _below(path, ".parquet"), _below(path, ".safetensors")
        if not tables and not files:
            found = "what `save_to_disk` wrote; write `load_from_disk(…).to_parquet(…)` instead"
            found = found if _below(path, ".arrow") else "none"
            raise DataError(f"{path}: expected .parquet or .safetensors files, found {found}")
        parquet += tables
        adapters += files
    if parquet and adapters:
        raise DataError(
            f"expected files of one kind, got {parquet[0].name} and {adapters[0].name}: "
            "import them one after the other"
        )
    if lacking := missing_shards(parquet):
        raise DataError(f"{parquet[0].parent}: only {lacking} are here; fetch the rest")
    if parquet:
        return ParquetSource(parquet, card)
    named = len(paths) == 1 and paths[0].is_dir()
    root = paths[0] if named else common_parent(adapters)
    return FilesSource(root, adapters, named=named)


def _below(path: Path, suffix: str) -> list[Path]:
    found = [path] if path.is_file() else path.rglob("*")
    return sorted(
        (f for f in found if f.suffix.lower() == suffix), key=lambda f: (natural_key(str(f)), f)
    )
