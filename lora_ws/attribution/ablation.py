"""True ablation: the same image from the same noise, with some of the adapters left out.

Of an adapter i the effect is the mean of ``|x - x_without_i|`` over pixels and channels, its map
the same without the mean over pixels, its share the effect over the sum of effects. An adapter that
does what another does too has no effect by this; `lora_ws.attribution.shapley` sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import decode_latents, initial_noise, size_of
from lora_ws.diffusion.prompts import check_single
from lora_ws.diffusion.schedulers import Run, begin_run, continue_run
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Ablation:
    """An image, and the same without each of its adapters.

    Attributes:
        names: of the k adapters.
        full: with all ``[3, height, width]``, from -1 to 1.
        base: with none.
        leave_one_out: without each ``[k, 3, height, width]``.
        strip: how all of these came about, in this order: images after some of the steps
            ``[k + 2, shown, 3, height, width]``; None where none were asked for.
        steps: which, counted from 1.
    """

    names: tuple[str, ...]
    full: Float[Tensor, "3 height width"]
    base: Float[Tensor, "3 height width"]
    leave_one_out: Float[Tensor, "k 3 height width"]
    strip: Float[Tensor, "pictures shown 3 height width"] | None = None
    steps: tuple[int, ...] = ()

    @property
    def maps(self) -> Float[Tensor, "k height width"]:
        """Where each adapter acted: absolute differences, averaged over channels."""
        return (self.leave_one_out - self.full).abs().mean(dim=1)

    @property
    def effects(self) -> Float[Tensor, " k"]:
        """How much each adapter did: the means of its map."""
        return self.maps.mean(dim=(1, 2))

    @property
    def shares(self) -> Float[Tensor, " k"]:
        """Effects over their sum; zeros where none did anything."""
        return self.effects / self.effects.sum().clamp(min=1e-12)


def ablate(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    *,
    start: int = 0,
    batch: int = 16,
    shown: int = 0,
) -> Ablation:
    """Draw with all adapters, with none, and without each, all in batches through the bank.

    What an adapter does to the text encoder is left out with it.

    Args:
        pipeline: the base; left as found.
        stack: the adapters.
        generation: what is drawn.
        start: leave adapters out from this step on, where 0 is the true ablation; before it all
            images are that with all adapters, which is drawn once. Steps are the scheduler's
            timesteps: second-order schedulers have more than the generation asks for.
        batch: images at once.
        shown: how many images on the way are kept.

    Raises:
        ConfigError: the prompt is too long, or ``start`` is no step.
        LayoutError: the adapters are of another base.
    """
    run = begun(pipeline, stack, generation, start, batch)
    first, last = start + 1, start + len(run.left)
    spread = torch.linspace(first, last, min(shown, last - start)).round().int().tolist()
    subsets, steps = ablation_subsets(len(stack)), sorted({*spread, last})
    strip = finish_subsets(pipeline, stack, generation, subsets, run, batch=batch, steps=steps)
    images, kept = strip[:, -1], strip if spread else None
    return Ablation(stack.names, images[0], images[1], images[2:], kept, tuple(spread))


def ablation_subsets(k: int) -> Bool[Tensor, "m k"]:
    """The subsets of an ablation: all, none, and all but each.

    Example:
        >>> ablation_subsets(2).int().tolist()
        [[1, 1], [0, 0], [0, 1], [1, 0]]
    """
    everyone, no_one = torch.ones(1, k, dtype=torch.bool), torch.zeros(1, k, dtype=torch.bool)
    return torch.cat([everyone, no_one, ~torch.eye(k, dtype=torch.bool)])


def draw_subsets(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    subsets: Bool[Tensor, "m k"],
    *,
    start: int = 0,
    batch: int = 16,
) -> Float[Tensor, "m 3 height width"]:
    """The same image with each of several subsets of the adapters.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        generation: what is drawn.
        subsets: which adapters are on, one row per image.
        start: see `ablate`.
        batch: images at once.
    """
    run = begun(pipeline, stack, generation, start, batch)
    return finish_subsets(pipeline, stack, generation, subsets, run, batch=batch)[:, 0]


def finish_subsets(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    subsets: Bool[Tensor, "m k"],
    run: Run,
    *,
    steps: Sequence[int] | None = None,
    batch: int = 16,
) -> Float[Tensor, "m steps 3 height width"]:
    """Finish one image with each of several subsets of the adapters.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        generation: what is drawn.
        subsets: which adapters are on, one row per image.
        run: of the image, before the first step to do; left as it is.
        steps: after which images are taken, counted from 1; None for the last.
        batch: images at once.

    Raises:
        ConfigError: the prompt is too long.
        LayoutError: the adapters are of another base.
    """
    steps = [run.number + len(run.left)] if steps is None else steps
    # Subsets that differ by adapters at scale 0 are one image.
    places: dict[tuple[float, ...], int] = {}
    mixtures = (subsets * torch.tensor(stack.scales)).tolist()
    place = [places.setdefault(tuple(row), len(places)) for row in mixtures]
    found = []
    for rows in torch.tensor(list(places)).split(batch):
        with stack.attach(pipeline, rows):
            going = continue_run(pipeline, run.repeated(len(rows)), generation)
            kept = [x.after for number, x in enumerate(going, run.number + 1) if number in steps]
            pictures = decode_latents(pipeline, torch.cat(kept)).cpu()
            found.append(pictures.unflatten(0, (len(steps), len(rows))).transpose(0, 1))
    return torch.cat(found)[place]


def begun(
    pipeline: Any, stack: AdapterStack, generation: GenerationSpec, start: int, batch: int = 16
) -> Run:
    """Run the generation with all adapters up to a step.

    Raises:
        ConfigError: the prompt is too long, ``start`` is no step, or see `begin_run`.
        LayoutError: the adapters are of another base.
    """
    if batch < 1:
        raise ConfigError(f"batch: expected at least 1, got {batch}")
    stack.bank.modules_of(denoiser_of(pipeline))
    check_single(pipeline, generation)
    noise = initial_noise(pipeline, [generation.seed], size_of(pipeline, generation))
    run = begin_run(pipeline, noise, generation)
    if not 0 <= start < len(run.left):
        raise ConfigError(f"start: expected a step from 0 to {len(run.left) - 1}, got {start}")
    if start:
        with stack.attach(pipeline, torch.tensor(stack.scales)):
            going = continue_run(pipeline, run, generation)
            for _ in zip(range(start), going, strict=False):
                pass
    return run
