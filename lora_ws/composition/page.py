"""A page that shows what adapters draw together: beside each alone, step by step, and how large."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_ws.composition.balance import block_norms, norm_balance
from lora_ws.composition.grid import ImageGrid
from lora_ws.diffusion.methods import Merge, Method
from lora_ws.diffusion.provenance import Provenance, used_adapters
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.text_encoders import TextMode
from lora_ws.report.images import save_grid, to_png
from lora_ws.report.page import Figure, Section, to_page

# Pixels per side that an image has at least.
SIDE = 96


def write_composition(
    out: Path,
    stack: AdapterStack,
    grid: ImageGrid,
    made: Provenance,
    method: Method,
    text: TextMode,
) -> list[Path]:
    """Write the grid of images, each image alone, the strip of steps, their page, and JSON.

    Args:
        out: PNG of the grid; the others are named after it.
        stack: the adapters.
        grid: what they drew.
        made: what the last row was made by.
        method: by which all acted together.
        text: what adapters of text encoders did.

    Returns:
        Page, JSON, and the folder of single images.
    """
    rows, course, generation = grid.rows, grid.course, made.generation
    scale = max(1, -(-SIDE // rows.shape[-1]))
    named = zip(stack.names, stack.scales, strict=True)
    labels = ["no adapter", *(f"{name} {size:g}" for name, size in named), made.method]
    every = _of_rows(stack, made, method, text)
    texts = every["all"].texts(made.seeds[0])
    picture = save_grid(rows.flatten(0, 1), rows.shape[1], out, scale, labels, texts)
    strip = save_grid(course, len(course), out.with_name(f"{out.stem}-steps.png"), scale)
    title = (
        f"{', '.join(dict.fromkeys(generation.prompts()))}; seeds {made.seeds[0]} to "
        f"{made.seeds[-1]}, {generation.num_inference_steps} steps, guidance "
        f"{generation.guidance_scale:g}"
    )
    after = f"The first image of the last row after steps {', '.join(map(str, grid.steps))}."
    page = out.with_suffix(".html")
    sections = [
        Section("Images", (title, Figure(picture, "All rows start from the same noise."))),
        Section("Step by step", (Figure(strip, after),)),
        Section("How large the updates are", (norm_balance(stack),)),
        Section("Made by", (made.facts(),)),
    ]
    page.write_text(to_page("Adapters together", sections), encoding="utf-8")
    norms = {block: norms.tolist() for block, norms in block_norms(stack).items()}
    facts = made.write(out.with_suffix(".json"), norms=norms)
    return [page, facts, _save_singles(out, grid, every)]


def _of_rows(
    stack: AdapterStack, made: Provenance, method: Method, text: TextMode
) -> dict[str, Provenance]:
    """What the images of each row were made by; names of rows are those of files."""
    if isinstance(method, Merge) and method.normalised:
        equal = stack.scaled([scale / len(stack) for scale in stack.scales])
        made = replace(made, adapters=used_adapters(equal, text), method="Merge")
    own = replace(made, adapters=used_adapters(stack, "none" if text == "none" else "merged"))
    alone = {name: own.only(k) for k, name in enumerate(stack.names)}
    return {"none": own.only(), **alone, "all": made}


def _save_singles(out: Path, grid: ImageGrid, every: Mapping[str, Provenance]) -> Path:
    """Each image as a PNG that says what it was made by."""
    folder = out.with_name(f"{out.stem}-images")
    folder.mkdir(exist_ok=True)
    for (name, made), images in zip(every.items(), grid.rows, strict=True):
        for seed, image in zip(made.seeds, images, strict=True):
            file = folder / f"{name}-{seed}.png"
            file.write_bytes(to_png(image, made.texts(seed)))
    return folder
