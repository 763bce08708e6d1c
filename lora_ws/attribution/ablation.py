"""True ablation: the same picture from the same noise, with some of the adapters left out.

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

from lora_ws.diffusion.pipeline import decode_latents, denoise, initial_noise
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and how.

    Attributes:
        prompt: what to draw.
        negative: what not to draw.
        seed: of the initial noise.
        steps: of denoising.
        guidance: scale of guidance; 1 for none.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 30
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps: expected at least 1, got {self.steps}")


@dataclass(frozen=True, eq=False)
class Ablation:
    """A picture, and the same without each of its adapters.

    Attributes:
        names: of the k adapters.
        whole: with all ``[3, height, width]``, from -1 to 1.
        bare: with none.
        without: without each ``[k, 3, height, width]``.
        strip: how all of these came about, in this order: pictures after some of the steps
            ``[k + 2, shown, 3, height, width]``; None where none were asked for.
        steps: which, counted from 1.
    """

    names: tuple[str, ...]
    whole: Float[Tensor, "3 height width"]
    bare: Float[Tensor, "3 height width"]
    without: Float[Tensor, "k 3 height width"]
    strip: Float[Tensor, "pictures shown 3 height width"] | None = None
    steps: tuple[int, ...] = ()

    @property
    def maps(self) -> Float[Tensor, "k height width"]:
        """Where each adapter acted: absolute differences, averaged over channels."""
        return (self.without - self.whole).abs().mean(dim=1)

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
    drawing: Drawing,
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
        drawing: what is drawn.
        start: leave adapters out from this step on, where 0 is the true ablation; before it all
            pictures are that with all adapters, which is drawn once.
        batch: pictures at once.
        shown: how many pictures on the way are kept.

    Raises:
        ConfigError: the prompt is too long, or ``start`` is no step.
        LayoutError: the adapters are of another base.
    """
    first, last = start + 1, drawing.steps
    spread = torch.linspace(first, last, min(shown, last - start)).round().int().tolist()
    strip = finish_subsets(
        pipeline,
        stack,
        drawing,
        leave_one_out(len(stack)),
        _begun(pipeline, stack, drawing, start, batch),
        start=start,
        batch=batch,
        steps=sorted({*spread, last}),
    )
    images, kept = strip[:, -1], strip if spread else None
    return Ablation(stack.names, images[0], images[1], images[2:], kept, tuple(spread))


def leave_one_out(k: int) -> Bool[Tensor, "m k"]:
    """The subsets of an ablation: all, none, and all but each.

    Example:
        >>> leave_one_out(2).int().tolist()
        [[1, 1], [0, 0], [0, 1], [1, 0]]
    """
    everyone, no_one = torch.ones(1, k, dtype=torch.bool), torch.zeros(1, k, dtype=torch.bool)
    return torch.cat([everyone, no_one, ~torch.eye(k, dtype=torch.bool)])


def draw_subsets(
    pipeline: Any,
    stack: AdapterStack,
    drawing: Drawing,
    subsets: Bool[Tensor, "m k"],
    *,
    start: int = 0,
    batch: int = 16,
) -> Float[Tensor, "m 3 height width"]:
    """The same picture with each of several subsets of the adapters.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        drawing: what is drawn.
        subsets: which adapters are on, a row a picture.
        start: see `ablate`.
        batch: pictures at once.
    """
    begun = _begun(pipeline, stack, drawing, start, batch)
    return finish_subsets(
        pipeline, stack, drawing, subsets, begun, start=start, batch=batch, steps=[drawing.steps]
    )[:, 0]


def finish_subsets(
    pipeline: Any,
    stack: AdapterStack,
    drawing: Drawing,
    subsets: Bool[Tensor, "m k"],
    latents: Float[Tensor, "1 channels h w"],
    *,
    start: int,
    steps: Sequence[int],
    batch: int = 16,
) -> Float[Tensor, "m steps 3 height width"]:
    """Finish one picture with each of several subsets of the adapters.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        drawing: what is drawn.
        subsets: which adapters are on, a row a picture.
        latents: before step ``start``; at 0, the noise that the drawing starts from.
        start: the first step to do.
        steps: after which pictures are taken, counted from 1.
        batch: pictures at once.

    Raises:
        ConfigError: the prompt is too long, or ``start`` is no step.
        LayoutError: the adapters are of another base.
    """
    _check(pipeline, stack, drawing, start, batch)
    scales, found = torch.tensor(stack.scales), []
    for rows in subsets.split(batch):
        with stack.attach(pipeline, rows * scales):
            begun = latents.expand(len(rows), -1, -1, -1)
            run = denoise(pipeline, begun, *_how(drawing, len(rows)), start, drawing.negative)
            kept = [x for number, x in enumerate(run, start + 1) if number in steps]
            pictures = decode_latents(pipeline, torch.cat(kept)).cpu()
            found.append(pictures.unflatten(0, (len(steps), len(rows))).transpose(0, 1))
    return torch.cat(found)


def _begun(
    pipeline: Any, stack: AdapterStack, drawing: Drawing, start: int, batch: int
) -> Float[Tensor, "1 channels h w"]:
    """The latents before a step of the drawing with all adapters."""
    _check(pipeline, stack, drawing, start, batch)
    latents = initial_noise(pipeline, [drawing.seed])
    if start:
        with stack.attach(pipeline, torch.tensor(stack.scales)):
            run = denoise(pipeline, latents, *_how(drawing, 1), 0, drawing.negative)
            latents = [after for after, _ in zip(run, range(start), strict=False)][-1]
    return latents


def _check(pipeline: Any, stack: AdapterStack, drawing: Drawing, start: int, batch: int) -> None:
    if not 0 <= start < drawing.steps:
        raise ConfigError(f"start: expected a step from 0 to {drawing.steps - 1}, got {start}")
    if batch < 1:
        raise ConfigError(f"batch: expected at least 1, got {batch}")
    stack.bank.modules_of(pipeline.unet)
    check_prompts(pipeline, [drawing.prompt, drawing.negative])


def _how(drawing: Drawing, count: int) -> tuple[Sequence[str], float, int]:
    return [drawing.prompt] * count, drawing.guidance, drawing.steps
