"""Train a batch of adapters in one forward pass, and record per adapter what the paper records."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lora_ws.adapters.layout import Layout
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.zoo.finetune import finetune
from lora_ws.zoo.sampling import AdapterPlan
from lora_ws.zoo.spec import ZooSpec

# Far from any adapter's seed, so that a second try draws nothing that another adapter drew.
RETRY = 10**9
# And so that no adapter with a start of its own has the one that others share.
SHARED = 5 * 10**8


def train_batch(
    pipeline: Any, layout: Layout, latents: torch.Tensor, jobs: Sequence[AdapterPlan], spec: ZooSpec
) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, Any]]]:
    """Train a batch of adapters, those that become NaN once more with another seed.

    Returns:
        Weights ``[adapters, layout.size]``, their table rows, and what became NaN again.
    """
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
    jobs: Sequence[AdapterPlan],
    spec: ZooSpec,
    attempt: int,
) -> list[tuple[np.ndarray, dict[str, Any]]]:
    start = spec.seed * 10**6 + attempt * RETRY
    seeds = [start + job.image_set for job in jobs]
    shared = jobs[0].a_init == "shared"
    a_seeds = [start + SHARED] * len(jobs) if shared else seeds
    bank = AdapterBank.fresh(layout, len(jobs), jobs[0].a_init, a_seeds[0])
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
                a_seeds[k],
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
    job: AdapterPlan,
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
        "number": job.number,
        "folder": name,
        "source": f"{job.subset}/{name}",
        "category_label": job.category,
        "category_name": job.leaf,
        "leaf_number": job.leaf_number,
        **({"label": job.label} if spec.sampling.flagged else {}),
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
