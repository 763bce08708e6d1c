"""Images without adapters, with each alone, and with all of them together, from the same noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.hooks import compose
from lora_ws.diffusion.methods import Method
from lora_ws.diffusion.pipeline import decode_latents, denoise, generate, initial_noise, size_of
from lora_ws.diffusion.schedulers import timesteps_for
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.text_encoders import TextMode
from lora_ws.report.progress import progress

# How many images show the way to the first composed one.
SHOWN = 8


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Images generated with each adapter alone, and with all.

    Attributes:
        rows: images from -1 to 1: without any adapter, with each of k alone, with all.
        course: the first composed image after some of the steps.
        steps: numbers of these steps, from 1.
    """

    rows: Float[Tensor, "k+2 images 3 height width"]
    course: Float[Tensor, "shown 3 height width"]
    steps: tuple[int, ...]


def draw_grid(
    pipeline: Any,
    stack: AdapterStack,
    method: Method,
    generation: GenerationSpec,
    *,
    images: int = 1,
    seeds: Sequence[int] | None = None,
    text: TextMode = "merged",
) -> ImageGrid:
    """Draw without adapters, with each alone, and with all by a method, from the same noise.

    Args:
        pipeline: the base; left as found.
        stack: the adapters.
        method: how they act together.
        generation: what is drawn.
        images: how many per row.
        seeds: of the noise, one per image, instead of those that follow the generation's own.
        text: what adapters of text encoders do; see `lora_ws.diffusion.compose`.

    Raises:
        ConfigError: the method does not fit the adapters, or prompts the images.
        LayoutError: the adapters are of another base.
    """
    first = generation.seed
    seeds = range(first, first + images) if seeds is None else seeds
    size, calls = size_of(pipeline, generation), calls_of(pipeline, generation)
    with _progress(denoiser_of(pipeline), (len(stack) + 2) * calls):
        rows = _draw_alone(pipeline, stack, generation, seeds, text)
        noise = initial_noise(pipeline, seeds, size)
        steps = shown_steps(calls)
        with compose(pipeline, stack, method, text=text):
            run = denoise(pipeline, noise, generation, seeds=seeds)
            kept = [latents for number, latents in enumerate(run, 1) if number in steps]
    rows.append(decode_latents(pipeline, kept[-1]).cpu())
    course = decode_latents(pipeline, torch.stack([latents[0] for latents in kept])).cpu()
    return ImageGrid(torch.stack(rows), course, steps)


def _draw_alone(
    pipeline: Any,
    stack: AdapterStack,
    generation: GenerationSpec,
    seeds: Sequence[int],
    text: TextMode,
) -> list[Float[Tensor, "images 3 height width"]]:
    """Images without any adapter, and with each alone."""
    rows = [generate(pipeline, generation, seeds=seeds)]
    # Of a single adapter its own text encoder's part is all there is, or none.
    text_alone: TextMode = "none" if text == "none" else "merged"
    for k in range(len(stack)):
        scales = [scale * (k == n) for n, scale in enumerate(stack.scales)]
        with compose(pipeline, stack, scales=scales, text=text_alone):
            rows.append(generate(pipeline, generation, seeds=seeds))
    return rows


def calls_of(pipeline: Any, generation: GenerationSpec) -> int:
    """Calls of the model in one generation, of which some schedulers have more than steps."""
    return len(timesteps_for(pipeline, generation))


@contextmanager
def _progress(denoiser: nn.Module, calls: int) -> Iterator[None]:
    """Show how many calls of a model are done, and the time left, until the block ends."""
    with progress("denoising", calls) as advance:
        handle = denoiser.register_forward_hook(lambda *_: advance())
        try:
            yield
        finally:
            handle.remove()


def shown_steps(steps: int) -> tuple[int, ...]:
    """The steps, counted from 1, whose images are shown: the last and some before it.

    Example:
        >>> shown_steps(30)
        (1, 5, 9, 13, 18, 22, 26, 30)
    """
    spread = torch.linspace(1, steps, min(SHOWN, steps)).round().int().tolist()
    return tuple(sorted(set(spread)))
