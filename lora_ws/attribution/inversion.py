"""Latents that an image went through, by DDIM inversion, and ablation from them.

A step of DDIM (Song et al. 2021) goes from x_t to x_s, of less noise, by the noise e that the model
predicts at x_t. Backwards x_t is not known; textbook inversion takes the prediction at x_s instead,
and drawing leads back to an image that is off by a tenth. The equation says that x_t is a fixed
point, and a few iterations find one, faster by Anderson's rule (1965).

A latent that leads back to the image need not be the one that it came from: several noises end in
nearly one image, the more so where adapters act strongly.

Ablation that starts late compares what adapters can still change, not what they did: most of an
image is settled in its first steps. `lora_ws.attribution.agreement` measures how much that costs.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from lora_ws.attribution.ablation import Ablation, ablation_subsets, begun, finish_subsets
from lora_ws.diffusion.families import family_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.prompts import check_single
from lora_ws.diffusion.schedulers import forgets
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

# Relative to the latents; a step is not iterated further below it.
_CONVERGED = 1e-5


@torch.no_grad()
def invert(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    latents: Float[Tensor, "n channels h w"],
    *,
    guidance_scale: float,
    fixed_point_iters: int = 8,
) -> Float[Tensor, "times n channels h w"]:
    """Find the latents before each step of a generation from those of its image.

    Args:
        pipeline: a base with a DDIM scheduler; left as found.
        stack: the adapters that the image was drawn with.
        generation: how it was drawn; its seed is not used.
        latents: of the image, as `trajectory` ends or `encode_images` gives them.
        guidance_scale: of the inversion; should be that of the generation.
        fixed_point_iters: for each step, at most, beyond textbook inversion, which is 0.

    Returns:
        Latents in the order of the generation: the noise first, the image's own last.

    Warns:
        UserWarning: inversion and generation are guided differently, and the latents found are not
            those that the image went through.

    Raises:
        ConfigError: the scheduler is not DDIM or clips what it predicts, a number is below what
            it can be, or the prompt is too long.
        LayoutError: the adapters are of another base.
    """
    _check(pipeline, fixed_point_iters, guidance_scale)
    check_single(pipeline, generation)
    if said := _mismatch(guidance_scale, generation):
        # One frame more than usual: that of no_grad.
        warnings.warn(said, stacklevel=3)
    scheduler, device = pipeline.scheduler, pipeline.unet.device
    steps = generation.num_inference_steps
    scheduler.set_timesteps(steps, device=device)
    alphas, stride = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps // steps
    found = [latents.to(device)]
    with stack.attach(pipeline, torch.tensor(stack.scales)):
        guided = replace(generation, guidance_scale=guidance_scale)
        predict = _predictor(pipeline, guided, len(latents))
        for time in scheduler.timesteps.flip(0):
            less = int(time) - stride
            kept = float(alphas[less] if less >= 0 else scheduler.final_alpha_cumprod)
            found.append(
                _back(found[-1], time, float(alphas[int(time)]), kept, predict, fixed_point_iters)
            )
    return torch.stack(found[::-1])


def pseudo_ablate(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    latents: Float[Tensor, "times 1 channels h w"],
    *,
    start: int,
    batch: int = 16,
) -> Ablation:
    """Leave adapters out from latents on that an image went through, cached or inverted.

    All images, that with all adapters too, are finished from the same latents, so that what
    inversion lost counts for none of the adapters.

    Args:
        pipeline: the base; left as found.
        stack: the adapters.
        generation: how the image was drawn.
        latents: what `trajectory` or `invert` returned.
        start: the first step without an adapter; from cached latents, 0 is the true ablation.
        batch: images at once.

    Raises:
        ConfigError: not as many latents as the generation needs, the prompt is too long,
            ``start`` is no step, or latents alone do not say how the scheduler goes on from there.
        LayoutError: the adapters are of another base.
    """
    run = begun(pipeline, stack, generation, 0, batch)
    steps = len(run.left)
    if latents.ndim != 5 or tuple(latents.shape[:2]) != (steps + 1, 1):
        raise ConfigError(
            f"latents: expected those of one image before each of {steps} steps and "
            f"after the last, [{steps + 1}, 1, channels, h, w], got {list(latents.shape)}"
        )
    if not 0 <= start < steps:
        raise ConfigError(f"start: expected a step from 0 to {steps - 1}, got {start}")
    if start and not forgets(pipeline, generation):
        raise ConfigError(
            f"scheduler: expected one that goes on from latents alone, such as DDIMScheduler; "
            f"{type(pipeline.scheduler).__name__} remembers steps or draws noise, which "
            "`ablate(start=...)` takes along"
        )
    run = replace(run, latents=latents[start].to(run.latents), number=start)
    subsets = ablation_subsets(len(stack))
    images = finish_subsets(pipeline, stack, generation, subsets, run, batch=batch)[:, 0]
    return Ablation(stack.names, images[0], images[1], images[2:])


def _mismatch(guidance: float, generation: GenerationSpec) -> str:
    # Below 1 there is no guidance either.
    if max(guidance, 1) == max(generation.guidance_scale, 1):
        return ""
    return (
        f"guidance_scale: the generation is guided by {generation.guidance_scale:g} and its "
        f"inversion by {guidance:g}, so that it does not lead back to where the generation began"
    )


def _back(
    x: Tensor,
    time: Tensor,
    kept: float,
    kept_less: float,
    predict: Callable[[Tensor, Tensor, float], Tensor],
    iterations: int,
) -> Tensor:
    """From x_s to x_t, where a step of DDIM from x_t leads to x_s."""
    guess, best, lowest = x, x, torch.full((len(x), 1, 1, 1), math.inf).to(x)
    before: tuple[Tensor, Tensor] | None = None
    for _ in range(iterations + 1):
        noise = predict(guess, time, kept)
        clean = (x - math.sqrt(1 - kept_less) * noise) / math.sqrt(kept_less)
        after = math.sqrt(kept) * clean + math.sqrt(1 - kept) * noise
        apart = after - guess
        guess = after if before is None else _accelerated(after, apart, *before)
        before = after, apart
        # Where the model is steep, iterations part again: keep what was nearest to a fixed point.
        error = _norms(apart)
        nearer = error < lowest
        best, lowest = torch.where(nearer, guess, best), torch.where(nearer, error, lowest)
        if bool((error <= _CONVERGED * _norms(x)).all()):
            break
    return best


def _accelerated(after: Tensor, apart: Tensor, after_1: Tensor, apart_1: Tensor) -> Tensor:
    """Anderson's step of memory 1; where noise is low, plain iterations hardly contract."""
    turn = apart - apart_1
    share = (apart * turn).sum(dim=(1, 2, 3), keepdim=True) / (_norms(turn) ** 2).clamp(min=1e-30)
    return after - share * (after - after_1)


def _norms(x: Tensor) -> Float[Tensor, "n 1 1 1"]:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def _predictor(
    pipeline: Any, generation: GenerationSpec, count: int
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The noise that the model predicts, guided."""
    family, guided = family_of(pipeline), generation.guided
    text = family.condition(generation, count)
    velocity = pipeline.scheduler.config.prediction_type == "v_prediction"

    def predict(x: Tensor, time: Tensor, kept: float) -> Tensor:
        twice = torch.cat([x] * (1 + guided))
        said = family.predict(twice, time, text)
        if guided:
            plain, asked = said.chunk(2)
            said = plain + generation.guidance_scale * (asked - plain)
        return math.sqrt(kept) * said + math.sqrt(1 - kept) * x if velocity else said

    return predict


def _check(pipeline: Any, iterations: int, guidance: float) -> None:
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, DDIMScheduler):
        raise ConfigError(
            f"scheduler: expected DDIMScheduler, got {type(scheduler).__name__}; set "
            "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config) and draw "
            "the image with it"
        )
    config = scheduler.config
    if config.clip_sample or config.thresholding:  # type: ignore[attr-defined]
        raise ConfigError(
            "scheduler: expected one that can be inverted, this one clips what it predicts; set "
            "clip_sample=False and thresholding=False"
        )
    if config.prediction_type not in ("epsilon", "v_prediction"):  # type: ignore[attr-defined]
        raise ConfigError(
            "scheduler: expected prediction_type epsilon or v_prediction, got "
            f"{config.prediction_type}"  # type: ignore[attr-defined]
        )
    if iterations < 0 or not math.isfinite(guidance):
        raise ConfigError(
            "expected fixed_point_iters of 0 or more and a finite guidance_scale, got "
            f"{iterations} and {guidance}"
        )
