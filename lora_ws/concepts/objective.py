"""What is measured of a model: how much a concept is in its predictions, or how well it draws it.

Nguyen et al. 2024 (CAD, "Unveiling concept attribution in diffusion models"). One trajectory per
seed gives all latents, each with its own timestep; the released code starts anew for every step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from lora_ws.concepts.spec import Eligible
from lora_ws.config import nearest
from lora_ws.diffusion.families import StableDiffusion, family_of
from lora_ws.diffusion.family import Conditioning, Family, repeated
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.gradients import requires_grad
from lora_ws.diffusion.pipeline import encode_images, initial_noise
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.diffusion.schedulers import begin_run, continue_run, timesteps_for, training_pair
from lora_ws.errors import ConfigError

# The released ablation touches matrices of the feed-forward parts of transformer blocks alone.
PARTS = {"ff": (".ff.",), "attention": (".attn.", ".attn1.", ".attn2."), "all": ("",)}
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Objective:
    """``J = sum_i ||Phi(z_i, t_i, c) - target_i||^2``, and what a large J means.

    Attributes:
        latents: z, as the model is given them.
        times: t.
        told: what the model is told of c, a single row.
        against: what predictions are compared with: what it is told of another prompt, for its own
            predictions of that, or constants like the latents.
        sign: 1 where J grows with the concept (erasing), -1 where it shrinks (a training loss).
        stop_gradient: take predictions of the other prompt for constants in gradients, as CAD
            does. Scores are then no first order of J, which `validity` shows, but edits by them
            leave other concepts more alone.
        family: of the model.
    """

    latents: Float[Tensor, "n channels h w"]
    times: Real[Tensor, " n"]
    told: Conditioning
    against: Conditioning | Float[Tensor, "n channels h w"]
    sign: int
    stop_gradient: bool = True
    family: type[Family] = StableDiffusion

    def value(self, unet: nn.Module) -> float:
        """J of a model."""
        with torch.no_grad():
            return float(sum(map(float, self._parts(unet))))

    def gradients(self, unet: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """dJ/dw of these weights, in float32; no other gradient is kept."""
        found = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        with requires_grad(weights.values()):
            for part in self._parts(unet):
                grads = torch.autograd.grad(part, list(weights.values()))
                for total, grad in zip(found.values(), grads, strict=True):
                    total += grad.float()
        return found

    def _parts(self, unet: nn.Module) -> Iterator[Tensor]:
        for k in range(0, len(self.latents), _ROWS_AT_ONCE):
            rows = slice(k, k + _ROWS_AT_ONCE)
            said = self._predict(unet, rows, self.told)
            if isinstance(self.against, Tensor):
                target = self.against[rows]
            else:
                target = self._predict(unet, rows, self.against)
                target = target.detach() if self.stop_gradient else target
            yield (said - target).float().square().sum()

    def _predict(self, unet: nn.Module, rows: slice, told: Conditioning) -> Tensor:
        z = self.latents[rows]
        return self.family.ask(unet, z, self.times[rows], repeated(told, len(z)))


def erase_objective(
    pipeline: Any,
    concept: str,
    *,
    base: str = "",
    seeds: Sequence[int] = (0,),
    steps: int = 50,
    guidance_scale: float = 3.0,
    stop_gradient: bool = True,
    compat: bool = False,
) -> Objective:
    """How far the concept moves predictions from those of a base prompt.

    Args:
        pipeline: of diffusers, of a kind in `lora_ws.diffusion.families`.
        concept: prompt of what is looked for.
        base: prompt to compare with.
        seeds: a trajectory each.
        steps: latents of each.
        guidance_scale: scale of guidance on the way.
        stop_gradient: see `Objective`.
        compat: pair latents with times as the released code does: the latent after step t with
            the time of step t, which speaks of one step more noise than is left in it. The first
            noise is not used and the finished latent is. Nothing else of that code is reproduced:
            it starts from fresh noise for every step, without seeds, and sums gradients in half
            precision.

    Raises:
        ConfigError: a prompt is too long, or there are no seeds.
    """
    check_prompts(pipeline, [concept, base])
    if not seeds:
        raise ConfigError("seeds: expected at least one, got none")
    noise = initial_noise(pipeline, seeds)
    generation = GenerationSpec(concept, guidance_scale=guidance_scale, num_inference_steps=steps)
    run = begin_run(pipeline, noise, generation, seeds=seeds)
    calls = [*continue_run(pipeline, run, generation)]
    if compat and not torch.equal(calls[0].inputs, calls[0].before):
        raise ConfigError(
            f"compat: expected a scheduler that does not scale what the model is given, got "
            f"{type(pipeline.scheduler).__name__}"
        )
    latents = torch.cat([call.after if compat else call.inputs for call in calls])
    times = torch.stack([call.time for call in calls]).repeat_interleave(len(seeds))
    family = family_of(pipeline)
    asked, other = family.told_of_both(generation, base)
    return Objective(latents, times, asked, other, 1, stop_gradient, type(family))


def amplify_objective(
    pipeline: Any,
    concept: str,
    images: Float[Tensor, "n 3 height width"],
    *,
    steps: int = 50,
    seed: int = 0,
) -> Objective:
    """The training loss on images of the concept, at each of the steps that sampling uses.

    Args:
        pipeline: of diffusers, of a kind in `lora_ws.diffusion.families`.
        concept: prompt of what the images show.
        images: from -1 to 1.
        steps: noise levels.
        seed: of the noise.

    Raises:
        ConfigError: the prompt is too long, or the scheduler does not say the noise levels of
            training.
    """
    check_prompts(pipeline, [concept])
    family, latents = family_of(pipeline), encode_images(pipeline, images)
    # Guidance is no part of training.
    generation = GenerationSpec(concept, guidance_scale=1, num_inference_steps=steps)
    own = timesteps_for(pipeline, generation).to(latents.device)
    times, clean = own.repeat_interleave(len(latents)), latents.repeat(len(own), 1, 1, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    noisy, target = training_pair(pipeline.scheduler, clean, noise, times)
    told = family.told_of(generation)
    return Objective(noisy, times, told, target, -1, family=type(family))


def eligible_weights(unet: nn.Module, which: Eligible = "ff") -> dict[str, nn.Parameter]:
    """The weights that may be scored and edited: matrices of some parts of a denoiser, by name.

    Raises:
        ConfigError: there is no such part, or the model has none of it.
    """
    if which not in PARTS:
        raise ConfigError(f"eligible: there is no `{which}`{nearest(which, list(PARTS))}")
    least = 2 if which == "all" else 1
    found = {
        name: weight
        for name, weight in unet.named_parameters()
        if weight.ndim >= 2
        and (weight.ndim == 2 or least == 2)
        and any(part in name for part in PARTS[which])
    }
    if not found:
        raise ConfigError(f"eligible: {type(unet).__name__} has no matrices of `{which}`")
    return found


@contextmanager
def restored(weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Give copies of weights, and put every bit back when the block ends, however it ends."""
    held = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield held
    finally:
        for name, weight in weights.items():
            weight.data.copy_(held[name])
