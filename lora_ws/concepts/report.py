"""What an edit did, beside as many weights drawn at random and the largest: page and images."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ws.concepts.edit import SparseEdit, magnitude_control, random_control
from lora_ws.concepts.objective import Objective
from lora_ws.concepts.scores import Scores, Validity
from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import generate, image_size
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.images import save_grid
from lora_ws.report.page import Figure, Section, to_page

SHOWN = 96


@dataclass(frozen=True)
class Outcome:
    """What an edit did to the objective, what scores predict beside the truth.

    Attributes:
        name: of the edit.
        changed: weights set to zero.
        predicted: by how much the concept's J falls, by the scores.
        true: by how much it does.
    """

    name: str
    changed: int
    predicted: float
    true: float


def outcomes(
    edits: Mapping[str, SparseEdit], objective: Objective, unet: nn.Module, scores: Scores
) -> list[Outcome]:
    """Measure edits; see `Outcome`."""
    before, found = objective.value(unet), []
    for name, edit in edits.items():
        flat = {key: scores[key].flatten() for key in edit.indices}
        predicted = float(sum(flat[key][at].sum() for key, at in edit.indices.items()))
        with edit.applied(unet):
            true = objective.sign * (before - objective.value(unet))
        found.append(Outcome(name, edit.changed, predicted, true))
    return found


def with_controls(
    name: str, edit: SparseEdit, weights: Mapping[str, nn.Parameter], seed: int = 0
) -> dict[str, SparseEdit]:
    """An edit and its two controls."""
    return {
        name: edit,
        "random": random_control(edit, weights, seed),
        "largest": magnitude_control(edit, weights),
    }


def write_edit(
    folder: Path,
    pipeline: Any,
    edits: Mapping[str, SparseEdit],
    found: Sequence[Outcome],
    valid: Validity,
    prompts: Sequence[str],
    *,
    guidance_scale: float = 3.0,
    images: int = 6,
) -> Path:
    """Write ``edit.safetensors``, ``edit.json``, ``edit.png`` and ``edit.html`` into a folder.

    Args:
        folder: made if missing.
        pipeline: unedited, and left so.
        edits: the first is the one that is kept; the others are its controls.
        found: what they did.
        valid: how well scores predict.
        prompts: the concept, and what is to be kept.
        guidance_scale: of the images.
        images: how many of each prompt.
    """
    edit = next(iter(edits.values()))
    edit.save(folder / "edit.safetensors")
    drawn: dict[tuple[str, str], Tensor] = {}
    for prompt in prompts:
        for name, one in {"before": None, **edits}.items():
            with one.applied(denoiser_of(pipeline)) if one else nullcontext():
                generation = GenerationSpec(prompt, guidance_scale=guidance_scale)
                drawn[prompt, name] = generate(pipeline, generation, images=images)
    changes = {
        name: {p: float((drawn[p, name] - drawn[p, "before"]).abs().mean()) for p in prompts}
        for name in edits
    }
    data = {
        **edit.facts,
        "outcomes": [vars(one) for one in found],
        "validity": {"correlation": valid.correlation, "masks": len(valid.true)},
        "image_changes": changes,
    }
    (folder / "edit.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    scale = max(1, -(-SHOWN // image_size(pipeline)))
    labels = [f"{prompt}, {name}" for prompt, name in drawn]
    tiles = torch.cat(list(drawn.values()))
    picture = save_grid(tiles, images, folder / "edit.png", scale, labels)
    cells = [
        (Cell(o.name), Cell(f"{o.changed}"), Cell(f"{o.predicted:.4g}"), Cell(f"{o.true:.4g}"))
        for o in found
    ]
    caption = (
        "By how much the measure of the concept falls. Scores hold for small edits: over "
        f"{len(valid.true)} random edits of one weight in a hundred their predictions and the "
        f"truth have a correlation of {valid.correlation:.2f}."
    )
    grid = Grid(("edit", "weights set to 0", "predicted", "true"), tuple(cells), caption)
    text = "; ".join(f"{name}: {value}" for name, value in edit.facts.items())
    sections = [
        Section("What was done", (text, grid)),
        Section("What it changed in images", (_changes_grid(changes, images),)),
        Section("Pictures", (Figure(picture, "The same noise in every row."),)),
    ]
    page = folder / "edit.html"
    page.write_text(to_page("An edit of a concept", sections), encoding="utf-8")
    return page


def _changes_grid(changes: Mapping[str, Mapping[str, float]], images: int) -> Grid:
    """How far images of the concept and of others are from those before, a column per prompt."""
    prompts = list(next(iter(changes.values())))
    rows = tuple(
        (Cell(name), *(Cell(f"{value:.3f}") for value in own.values()))
        for name, own in changes.items()
    )
    caption = (
        f"Mean absolute difference from the images before, of pixels from -1 to 1, {images} images "
        "of each prompt from the same noise. The first prompt is the concept; of the others a "
        "change is damage."
    )
    return Grid(("edit", *prompts), rows, caption)
