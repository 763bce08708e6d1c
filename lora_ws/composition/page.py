"""A page that shows what adapters draw together: beside each alone, step by step, and how large."""

from pathlib import Path

from lora_ws.composition.balance import norm_balance
from lora_ws.composition.grid import ImageGrid
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.report.images import save_grid
from lora_ws.report.page import Figure, Section, to_page

# Pixels per side that a picture has at least.
SIDE = 96


def write_composition(
    out: Path, stack: AdapterStack, grid: ImageGrid, method: str, generation: GenerationSpec
) -> Path:
    """Write the grid of pictures, the strip of steps, and a page of both.

    Args:
        out: PNG of the grid; the others are named after it.
        stack: the adapters.
        grid: what they drew.
        method: by which all act together.
        generation: what was drawn.

    Returns:
        The page.
    """
    rows, course = grid.rows, grid.course
    scale = max(1, -(-SIDE // rows.shape[-1]))
    named = zip(stack.names, stack.scales, strict=True)
    labels = ["no adapter", *(f"{name} {size:g}" for name, size in named), method]
    picture = save_grid(rows.flatten(0, 1), rows.shape[1], out, scale, labels)
    strip = save_grid(course, len(course), out.with_name(f"{out.stem}-steps.png"), scale)
    title = (
        f"{', '.join(dict.fromkeys(generation.prompts()))}; seed {generation.seed}, "
        f"{generation.num_inference_steps} steps, guidance {generation.guidance_scale:g}"
    )
    after = f"The first picture of the last row after steps {', '.join(map(str, grid.steps))}."
    page = out.with_suffix(".html")
    sections = [
        Section("Pictures", (title, Figure(picture, "All rows start from the same noise."))),
        Section("Step by step", (Figure(strip, after),)),
        Section("How large the updates are", (norm_balance(stack),)),
    ]
    page.write_text(to_page("Adapters together", sections), encoding="utf-8")
    return page
