"""Build a share of a collection: plan, train in batches, commit each batch to a store.

A batch counts once the store's journal has its line, so a run that was killed goes on behind the
last finished batch, and what it makes is what an undisturbed run makes (times aside).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.card import DatasetCard, SplitRule
from lora_ws.collection.store import StoreWriter, row_hashes
from lora_ws.config import to_plain
from lora_ws.diffusion.pipeline import (
    adapter_layout,
    base_facts,
    encode_images,
    image_size,
    load_pipeline,
)
from lora_ws.errors import ConfigError, DataError
from lora_ws.report.progress import progress
from lora_ws.threads import threads
from lora_ws.zoo.batch import train_batch
from lora_ws.zoo.memory import adapters_that_fit
from lora_ws.zoo.photos import Photos, load_photos
from lora_ws.zoo.sampling import LABELS, AdapterPlan, plan_adapters
from lora_ws.zoo.spec import ZooSpec


def build_share(spec: ZooSpec) -> AdapterSet:
    """Train a share of a collection in this process, or go on with one that was cut off.

    Raises:
        ConfigError: photos and recipe do not fit.
        DataError: ``out`` exists, or an unfinished store of another recipe is in its place.
    """
    with threads(1):
        pipeline = load_pipeline(spec.base, spec.device)
        photos = _unseen(load_photos(spec.photos, image_size(pipeline)), spec.base)
        jobs = plan_adapters(photos, spec.sampling, spec.seed)
        layout = adapter_layout(pipeline.unet, spec.finetune.rank)
        share, shares = spec.share
        if spec.adapters_at_once is None:
            fit = adapters_that_fit(pipeline, layout, spec.finetune, spec.memory_gb)
            largest = max(Counter(job.subset for job in jobs).values())
            # Every share gets something to do.
            spec = replace(spec, adapters_at_once=min(fit, -(-largest // shares)))
        batches = make_batches(jobs, spec.adapters_at_once or 1)[share::shares]
        if not batches:
            raise ConfigError(
                f"shard: nothing is left for share {spec.shard} of {len(jobs)} adapters in batches "
                f"of {spec.adapters_at_once}; lower adapters_at_once, or use fewer shares"
            )
        latents = encode_images(pipeline, photos.tensor())
        hashes = photos.hashes()
        with StoreWriter(spec.path, layout, _card(spec, jobs), _origin(spec)) as writer:
            done = writer.rows + len(writer.quarantine)
            with progress("train adapters", sum(map(len, batches)), done) as advance:
                for batch in batches[writer.batches :]:
                    weights, rows, lost = train_batch(pipeline, layout, latents, batch, spec)
                    digests = row_hashes(weights)
                    for row, digest in zip(rows, digests, strict=True):
                        row |= {"images": [hashes[k] for k in row["images"]], "sha256": digest}
                    writer.append(weights, pa.Table.from_pylist(rows), lost)
                    advance(len(batch))
            writer.finish()
    return AdapterSet.open(spec.path)


def make_batches(jobs: Sequence[AdapterPlan], size: int) -> list[list[AdapterPlan]]:
    """Cut jobs into batches of nearly equal size that hold one subset each."""
    subsets: dict[str, list[AdapterPlan]] = {}
    for job in jobs:
        subsets.setdefault(job.subset, []).append(job)
    batches = []
    for own in subsets.values():
        for index in np.array_split(np.arange(len(own)), -(-len(own) // size)):
            batches.append([own[k] for k in index])
    return batches


def _unseen(photos: Photos, base: str) -> Photos:
    """Leave out the photos that the base was trained on."""
    seen = set(base_facts(base).get("photos", []))
    keep = np.array([k for k, digest in enumerate(photos.hashes()) if digest not in seen], int)
    if not len(keep):
        raise DataError(
            f"photos: {base} was trained on every one of these; name others, such as "
            "`--photos.split test`"
        )
    return photos.select(keep)


def _identity(base: str) -> Any:
    facts = base_facts(base)
    return {"name": facts.get("name", base), "recipe": facts.get("recipe", {})}


def _origin(spec: ZooSpec) -> dict[str, Any]:
    """What decides the numbers of a share; where it is made, and how fast, does not."""
    recipe = to_plain(replace(spec, photos=spec.photos.public))
    for name in ("out", "device", "processes", "memory_gb"):
        recipe.pop(name)
    return {"origin": "lora-ws zoo build", "recipe": recipe, "base": _identity(spec.base)}


def _card(spec: ZooSpec, jobs: Sequence[AdapterPlan]) -> DatasetCard:
    subsets = tuple(dict.fromkeys(job.subset for job in jobs))
    flagged = spec.sampling.flagged is not None
    return DatasetCard(
        name=Path(spec.out).name,
        title=f"Adapters trained on photos of {spec.photos.public.source}",
        label="label" if flagged else "category_label",
        classes=LABELS if flagged else tuple(sorted({job.category for job in jobs})),
        base_model=spec.base,
        split=SplitRule(column="part"),
        subset="subset",
        subsets=subsets,
        source="made by lora-ws zoo build; recipe in manifest.json",
    )
