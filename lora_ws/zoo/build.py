"""Build a collection: plan, train in batches, commit each batch to a store.

A batch counts once the store's journal has its line, so a run that was killed goes on behind the
last finished batch, and what it makes is what an undisturbed run makes (times aside).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lora_ws.adapters.layout import Layout
from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.card import DatasetCard, SplitRule
from lora_ws.collection.store import StoreWriter, row_hashes
from lora_ws.config import to_plain
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import (
    adapter_layout,
    base_facts,
    encode_images,
    image_size,
    load_pipeline,
)
from lora_ws.errors import ConfigError, DataError
from lora_ws.report.progress import progress
from lora_ws.zoo.finetune import FinetuneSpec, finetune
from lora_ws.zoo.photos import Photos, PhotoSpec, load_photos
from lora_ws.zoo.sampling import Job, SamplingSpec, plan_jobs

# Far from any adapter's seed, so that a second try draws nothing that another adapter drew.
RETRY = 10**9


@dataclass(frozen=True)
class ZooSpec:
    """A collection to build.

    Attributes:
        out: folder of the new store.
        base: "digit-sd" or "tiny-sd" (bundled), a pipeline's folder, or a repository on the Hub.
        photos: images of the adapters; those that the base was trained on are left out.
        sampling: which images make which adapter.
        finetune: how an adapter is trained.
        adapters_at_once: adapters trained in one forward pass; more need more memory.
        shard: "i/n" builds the i-th of n shares, from 0, into a store of its own.
        device: where to train.
        seed: of image sets, starts, noise and order.
    """

    out: Path = Path("zoo")
    base: str = "digit-sd"
    photos: PhotoSpec = field(default_factory=lambda: PhotoSpec(split="test"))
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    finetune: FinetuneSpec = field(default_factory=FinetuneSpec)
    adapters_at_once: int = 50
    shard: str = "0/1"
    device: str = "cpu"
    seed: int = 0


def build_zoo(spec: ZooSpec) -> AdapterSet:
    """Train a collection of adapters, or go on with one that was cut off.

    Raises:
        ConfigError: photos and recipe do not fit, or ``shard`` is not "i/n".
        DataError: ``out`` exists, or an unfinished store of another recipe is in its place.
    """
    shard, shards = _shard(spec.shard)
    pipeline = load_pipeline(spec.base, spec.device)
    photos = _unseen(load_photos(spec.photos, image_size(pipeline)), spec.base)
    jobs = plan_jobs(photos, spec.sampling, spec.seed)
    batches = make_batches(jobs, spec.adapters_at_once)[shard::shards]
    if not batches:
        raise ConfigError(f"shard: nothing is left for share {spec.shard} of {len(jobs)} adapters")
    layout = adapter_layout(pipeline.unet, spec.finetune.rank)
    latents = encode_images(pipeline, photos.tensor())
    hashes = photos.hashes()
    public = replace(spec, photos=spec.photos.public)
    origin = {"recipe": to_plain(public) | {"out": "", "device": ""}, "base": _identity(spec.base)}
    with StoreWriter(shard_path(spec), layout, _card(spec, jobs), origin) as writer:
        total = sum(map(len, batches))
        with progress("train adapters", total, writer.rows + len(writer.quarantine)) as advance:
            for batch in batches[writer.batches :]:
                weights, rows, lost = _train_batch(pipeline, layout, latents, batch, spec)
                for row in rows:
                    row["images"] = [hashes[k] for k in row["images"]]
                digests = row_hashes(weights)
                rows = [row | {"sha256": d} for row, d in zip(rows, digests, strict=True)]
                table = pa.Table.from_pylist(rows) if rows else pa.table({})
                writer.append(weights, table, lost)
                advance(len(batch))
        writer.finish()
    return AdapterSet.open(shard_path(spec))


def shard_path(spec: ZooSpec) -> Path:
    """Where a share goes: ``out`` itself if there is one only."""
    shard, shards = _shard(spec.shard)
    out = Path(spec.out)
    return out if shards == 1 else out.with_name(f"{out.name}-{shard:05d}-of-{shards:05d}")


def make_batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Cut jobs into batches that hold one subset each."""
    if size < 1:
        raise ConfigError(f"adapters_at_once: expected at least 1, got {size}")
    subsets: dict[str, list[Job]] = {}
    for job in jobs:
        subsets.setdefault(job.subset, []).append(job)
    return [own[k : k + size] for own in subsets.values() for k in range(0, len(own), size)]


def _train_batch(
    pipeline: Any, layout: Layout, latents: torch.Tensor, jobs: Sequence[Job], spec: ZooSpec
) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, Any]]]:
    """Weights and table rows of a batch, and what was lost to NaN twice."""
    weights, rows, lost = [], [], []
    first = _attempt(pipeline, layout, latents, jobs, spec, 0)
    for job, (vector, row) in zip(jobs, first, strict=True):
        if not np.isfinite(vector).all():
            ((vector, row),) = _attempt(pipeline, layout, latents, [job], spec, 1)
        if np.isfinite(vector).all():
            weights.append(vector)
            rows.append(row)
        else:
            reason = f"weights became NaN or infinite with seeds of both tries ({row['seed']})"
            lost.append({"source": row["source"], "reason": reason, "rows_lost": 1})
    return np.stack(weights) if weights else np.empty((0, layout.size), np.float32), rows, lost


def _attempt(
    pipeline: Any,
    layout: Layout,
    latents: torch.Tensor,
    jobs: Sequence[Job],
    spec: ZooSpec,
    attempt: int,
) -> list[tuple[np.ndarray, dict[str, Any]]]:
    start = spec.seed * 10**6 + attempt * RETRY
    seeds = [start + job.image_set for job in jobs]
    shared = jobs[0].a_init == "shared"
    bank = AdapterBank.fresh(layout, len(jobs), jobs[0].a_init, start if shared else seeds[0])
    bank.to(spec.device)
    began = time.perf_counter()
    images = [latents[list(job.images)] for job in jobs]
    result = finetune(pipeline, bank, images, [job.text for job in jobs], seeds, spec.finetune)
    took = (time.perf_counter() - began) / len(jobs)
    vectors = result.rows.cpu().numpy()
    return [
        (
            vectors[k],
            _row(
                job,
                seeds[k],
                start if shared else seeds[k],
                vectors[k],
                layout,
                result.step_loss[k],
                result.grad_norm[k],
                took,
                spec,
            ),
        )
        for k, job in enumerate(jobs)
    ]


def _row(
    job: Job,
    seed: int,
    a_seed: int,
    vector: np.ndarray,
    layout: Layout,
    loss: torch.Tensor,
    norm: torch.Tensor,
    took: float,
    spec: ZooSpec,
) -> dict[str, Any]:
    """Metadata of one adapter; the paper's names where it has them."""
    tune, name = spec.finetune, f"{job.category}/folder_{job.number:05d}"
    per_epoch = max(1, len(job.images) // tune.batch_size)
    downs = np.concatenate([vector[a] for _, a, _ in layout.pairs()])
    ups = np.concatenate([vector[b] for _, _, b in layout.pairs()])
    return {
        "folder": name,
        "source": f"{job.subset}/{name}",
        "category_label": job.category,
        "category_name": job.leaf,
        "leaf_id": job.leaf_id,
        "num_images": len(job.images),
        "images": list(job.images),
        "image_set": job.image_set,
        "subset": job.subset,
        "a_init": job.a_init,
        "prompt_kind": job.prompt,
        "prompt": job.text,
        "part": job.part,
        "leaf_part": job.leaf_part,
        "seed": seed,
        "a_seed": a_seed,
        "base": spec.base,
        "rank": tune.rank,
        "alpha": tune.rank,
        "learning_rate": tune.learning_rate,
        "batch_size": tune.batch_size,
        "gradient_accumulation_steps": 1,
        "max_train_steps": tune.steps,
        "num_batches": per_epoch,
        "num_epochs": -(-tune.steps // per_epoch),
        "step_loss": loss.tolist(),
        "epoch_loss": [float(part.mean()) for part in loss.split(per_epoch)],
        "grad_norm": norm.tolist(),
        "weight_norm_a": float(np.linalg.norm(downs)),
        "weight_norm_b": float(np.linalg.norm(ups)),
        "duration_s": took,
    }


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


def _card(spec: ZooSpec, jobs: Sequence[Job]) -> DatasetCard:
    subsets = tuple(dict.fromkeys(job.subset for job in jobs))
    return DatasetCard(
        name=Path(spec.out).name,
        title=f"Adapters trained on photos of {spec.photos.public.source}",
        classes=tuple(sorted({job.category for job in jobs})),
        base_model=spec.base,
        split=SplitRule(column="part"),
        subset="subset",
        subsets=subsets,
        source="made by lora-ws zoo build; recipe in manifest.json",
    )


def _shard(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ConfigError(f"shard: expected i/n with 0 <= i < n, such as 0/4, got `{text}`")
    return int(first), int(second)
