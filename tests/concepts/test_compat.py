"""The pairing of latents and times, ours and that of the released code, against a plain loop."""

from typing import Any

import pytest
import torch
from tolerances import rounding, terms_of
from torch import Tensor

from lora_ws.concepts.objective import erase_objective

CONCEPT, SEEDS, STEPS, GUIDANCE = "a photo of three", (4, 9), 6, 3.0


@torch.no_grad()
def by_hand(pipeline: Any, after: bool) -> tuple[Tensor, Tensor, float, float]:
    """Latents, times, J and squares of predictions of a guided DDIM loop.

    Each latent is taken before its step, or after it.
    """
    tokens = pipeline.tokenizer(
        [CONCEPT, ""], padding="max_length", max_length=10, return_tensors="pt"
    ).input_ids
    asked, plain = pipeline.text_encoder(tokens)[0].split(1)

    def noise_of(z: Tensor, time: int, text: Tensor) -> Tensor:
        return pipeline.unet(z, time, text.expand(len(z), -1, -1)).sample

    alphas = pipeline.scheduler.alphas_cumprod
    shape = (4, *[pipeline.unet.config.sample_size] * 2)
    z = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    )
    gap = 1000 // STEPS
    latents, times, total, squares = [], [], 0.0, 0.0
    for k in range(STEPS):
        time, before = (STEPS - 1 - k) * gap + 1, z
        empty = noise_of(z, time, plain)
        guided = empty + GUIDANCE * (noise_of(z, time, asked) - empty)
        now, then = alphas[time], alphas[max(time - gap, 0)]
        image = (z - (1 - now).sqrt() * guided) / now.sqrt()
        z = then.sqrt() * image + (1 - then).sqrt() * guided
        paired = z if after else before
        empty = noise_of(paired, time, plain)
        total += float((noise_of(paired, time, asked) - empty).square().sum())
        squares += float(empty.square().sum())
        latents.append(paired)
        times += [time] * len(SEEDS)
    return torch.cat(latents), torch.tensor(times), total, squares


@pytest.mark.parametrize("compat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_latents_are_paired_with_times_as_said(compat: bool, pipeline: Any) -> None:
    latents, times, total, squares = by_hand(pipeline, after=compat)
    objective = erase_objective(
        pipeline, CONCEPT, seeds=SEEDS, steps=STEPS, guidance_scale=GUIDANCE, compat=compat
    )
    assert objective.times.tolist() == times.tolist()
    bound = rounding(terms_of(pipeline.unet), steps=STEPS * (2 * GUIDANCE - 1))
    size = float(latents.abs().max())
    assert torch.allclose(objective.latents, latents, rtol=0, atol=bound * size)
    # Of squares of small differences of predictions.
    rel = 2 * bound * (squares / total) ** 0.5
    assert objective.value(pipeline.unet) == pytest.approx(total, rel=rel)
