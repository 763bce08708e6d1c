"""A page that shows which adapter did what to an image."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.attribution.ablation import Ablation
from lora_ws.attribution.boxes import BoxScores
from lora_ws.attribution.run import Attributed
from lora_ws.attribution.shapley import Shapley
from lora_ws.report.charts import chart_shares
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.images import save_grid, to_png
from lora_ws.report.page import Figure, Section, to_page

# Pixels per side that an image has at least.
SHOWN, STRIP = 128, 64


def write_attribution(
    folder: Path, done: Attributed, learned: dict[str, str] | None = None
) -> Path:
    """Write ``attribution.html``, ``attribution.json`` and images as PNG files into a folder.

    Args:
        folder: made if missing.
        done: what was drawn, and what leaving out did.
        learned: name -> what a classifier says an adapter learned.
    """
    generation, ablation = done.generation, done.ablation
    grid = with_thumbnails(shares_grid(ablation, done.shapley, learned), ablation)
    picture = save_pictures(ablation, folder / "attribution.png")
    text = (
        f"Prompt: {generation.prompt}. Seed {generation.seed}, "
        f"{generation.num_inference_steps} steps, guidance {generation.guidance_scale:g}. Every "
        "image starts from the same noise."
    )
    legend = (
        "First row: the image with all adapters, and with none. Then a row per adapter: the "
        "image without it, what that changed, and the change over the image; the brightest is "
        "the largest change of any adapter."
    )
    chart = Figure(shares_chart(ablation, folder / "shares.png"), "What each adapter changed.")
    sections = [
        Section("Shares", (text, chart, grid)),
        Section("Pictures", (Figure(picture, legend),)),
    ]
    if done.given is not None:
        sections.append(given_section(done, done.given, folder / "given.png"))
    if ablation.strip is not None:
        strip = save_strip(ablation.names, ablation.strip, folder / "strip.png")
        said = f"After steps {', '.join(map(str, ablation.steps))}: what is there by then."
        sections.append(Section("Step by step", (Figure(strip, said),)))
    if done.boxes is not None:
        sections.append(Section("Boxes", (boxes_grid(done.boxes),)))
    if done.made is not None:
        sections.append(Section("Made by", (done.made.facts(),)))
        done.made.write(folder / "attribution.json", **_numbers(done))
    page = to_page("Which adapter did this?", sections)
    file = folder / "attribution.html"
    file.write_text(page, encoding="utf-8")
    return file


def _numbers(done: Attributed) -> dict[str, Any]:
    """What the page's table says, for JSON."""
    ablation = done.ablation
    numbers: dict[str, Any] = {
        "effects": dict(zip(ablation.names, ablation.effects.tolist(), strict=True)),
        "shares": dict(zip(ablation.names, ablation.shares.tolist(), strict=True)),
    }
    if done.shapley is not None:
        numbers["shapley"] = dict(zip(ablation.names, done.shapley.values.tolist(), strict=True))
    if done.distance is not None:
        numbers |= {"distance": done.distance, "left_out": dict(done.left_out)}
    return numbers


def given_section(done: Attributed, given: Float[Tensor, "3 height width"], file: Path) -> Section:
    """The given image beside the one generated again, their distance, and what differs."""
    scale = max(1, -(-SHOWN // given.shape[-1]))
    picture = save_grid([given, done.ablation.full], 2, file, scale)
    rows = tuple((Cell(name), Cell(value)) for name, value in done.left_out.items())
    parts: list[Figure | Grid] = [Figure(picture, given_text(done))]
    if rows:
        caption = "Settings of the given image that are not reproduced."
        parts.append(Grid(("setting", "value"), rows, caption, left=2))
    return Section("Given image", tuple(parts))


def given_text(done: Attributed) -> str:
    """How far the given image is from the one whose adapters are attributed."""
    most = float(done.ablation.effects.max())
    return (
        f"Given image, and generated again: mean absolute difference {done.distance:.4f}, "
        f"of pixels from -1 to 1; the largest effect of an adapter is {most:.4f}. The shares "
        "explain the image generated again."
    )


def shares_grid(
    ablation: Ablation, shapley: Shapley | None, learned: dict[str, str] | None
) -> Grid:
    """Effect, share and value of each adapter."""
    effects, shares = ablation.effects.tolist(), ablation.shares.tolist()
    columns = {
        "effect": [Cell(f"{value:.4f}") for value in effects],
        "share": ranked(shares, [f"{100 * value:.1f} %" for value in shares]),
    }
    caption = (
        "Effect: mean absolute difference that leaving the adapter out makes, of pixels from -1 to "
        "1; share: of the sum of effects."
    )
    if shapley is not None:
        values = zip(shapley.values, shapley.errors, strict=True)
        texts = [f"{v:.4f} ± {e:.4f}" if e else f"{v:.4f}" for v, e in values]
        columns["Shapley value"] = ranked(shapley.values.tolist(), texts)
        caption += (
            " Shapley value: what the adapter adds on average to the distance from the image "
            f"without any, from {shapley.subsets} images."
        )
    names = [Cell(name) for name in ablation.names]
    if learned:
        columns = {"learned": [Cell(learned.get(n, "")) for n in ablation.names], **columns}
    rows = tuple(zip(names, *columns.values(), strict=True))
    return Grid(("adapter", *columns), rows, caption, 2 if learned else 1, "largest")


def with_thumbnails(grid: Grid, ablation: Ablation) -> Grid:
    """Put before each adapter's row where it changed the image."""
    maps = ablation.maps / ablation.maps.max().clamp(min=1e-12)
    cells = [
        Cell(f"what {name} changed", image=to_png(over(ablation.full, change)))
        for name, change in zip(ablation.names, maps, strict=True)
    ]
    rows = tuple((cell, *row) for cell, row in zip(cells, grid.rows, strict=True))
    return replace(grid, head=("", *grid.head), rows=rows, left=grid.left + 1)


def boxes_grid(scores: BoxScores) -> Grid:
    """Share of each adapter in what stands in each box."""
    rows = tuple(
        (Cell(str(tuple(box))), *ranked(shares, [f"{100 * share:.1f} %" for share in shares]))
        for box, shares in zip(scores.boxes, scores.shares.tolist(), strict=True)
    )
    caption = (
        "Boxes: left, top, right, bottom in pixels. Shares of what leaving an adapter out does to "
        f"the prediction in the box, by gradients ({scores.method})."
    )
    return Grid(("box", *scores.names), rows, caption, top="largest")


def save_pictures(ablation: Ablation, file: Path) -> Path:
    """The images and maps of an ablation as one grid."""
    maps = ablation.maps / ablation.maps.max().clamp(min=1e-12)
    blank = torch.ones_like(ablation.full)
    tiles = [ablation.full, ablation.base, blank]
    for without, change in zip(ablation.leave_one_out, maps, strict=True):
        tiles += [without, heat(change), over(ablation.full, change)]
    labels = ["all, and none", *(f"without {name}" for name in ablation.names)]
    scale = max(1, -(-SHOWN // ablation.full.shape[-1]))
    return save_grid(tiles, 3, file, scale, labels)


def save_strip(
    names: Sequence[str], strip: Float[Tensor, "pictures shown 3 height width"], file: Path
) -> Path:
    """How the images of an ablation came about, one row each."""
    labels = ["all", "none", *(f"without {name}" for name in names)]
    scale = max(1, -(-STRIP // strip.shape[-1]))
    return save_grid(strip.flatten(0, 1), strip.shape[1], file, scale, labels)


def shares_chart(ablation: Ablation, file: Path) -> Path:
    """Shares as bars."""
    shares = dict(zip(ablation.names, (100 * ablation.shares).tolist(), strict=True))
    title, xlabel = "One image", "share of the sum of effects, percent"
    return chart_shares(shares, file, title=title, xlabel=xlabel)


def heat(change: Float[Tensor, "height width"]) -> Float[Tensor, "3 height width"]:
    """A map from 0 to 1 as an image from black over red to white."""
    channels = [(3 * change - k).clamp(0, 1) for k in range(3)]
    return torch.stack(channels) * 2 - 1


def over(
    picture: Float[Tensor, "3 height width"], change: Float[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    """An image in grey, with what changed in red."""
    grey = picture.mean(dim=0, keepdim=True).expand(3, -1, -1)
    red = torch.tensor([1.0, -0.6, -0.8])[:, None, None]
    return grey + change * (red - grey)
