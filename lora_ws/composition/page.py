"""A page that shows what adapters draw together: beside each alone, step by step, and how large."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.composition.balance import norm_balance
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.report.images import save_grid
from lora_ws.report.page import Figure, Section, to_page

# Pixels a side that a picture has at least, and how many pictures of the way there are.
SHOWN, STRIP = 96, 8


def strip_steps(steps: int) -> list[int]:
    """The steps, counted from 1, whose pictures are shown: the last and some before it.

    Example:
        >>> strip_steps(30)
        [1, 5, 9, 13, 18, 22, 26, 30]
    """
    return sorted(set(torch.linspace(1, steps, min(STRIP, steps)).round().int().tolist()))


def write_composition(
    out: Path,
    stack: AdapterStack,
    rows: Float[Tensor, "rows images 3 height width"],
    method: str,
    title: str,
    course: Float[Tensor, "shown 3 height width"],
    at: Sequence[int],
) -> Path:
    """Write the grid of pictures, the strip of steps, and a page of both.

    Args:
        out: PNG of the grid; the others are named after it.
        stack: the adapters.
        rows: pictures from -1 to 1 without any adapter, with each alone, with all.
        method: by which all act together.
        title: what was drawn.
        course: how the first picture of the last row came about.
        at: after which steps.

    Returns:
        The page.
    """
    scale = max(1, -(-SHOWN // rows.shape[-1]))
    named = zip(stack.names, stack.scales, strict=True)
    labels = ["no adapter", *(f"{name} {size:g}" for name, size in named), method]
    grid = save_grid(rows.flatten(0, 1), rows.shape[1], out, scale, labels)
    strip = save_grid(course, len(course), out.with_name(f"{out.stem}-steps.png"), scale)
    said = f"The first picture of the last row after steps {', '.join(map(str, at))}."
    page = out.with_suffix(".html")
    sections = [
        Section("Pictures", (title, Figure(grid, "All rows start from the same noise."))),
        Section("Step by step", (Figure(strip, said),)),
        Section("How large the updates are", (norm_balance(stack),)),
    ]
    page.write_text(to_page("Adapters together", sections), encoding="utf-8")
    return page
