"""The sections of the report on attribution, one per stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_ws.experiments.attribution.spec import AttributionSpec
from lora_ws.experiments.quoted import published_section
from lora_ws.report.charts import chart_trade
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.page import Figure, Section

Values = Mapping[str, Any]
PICTURE = "pictures.png"
# What `Agreement` says, in its order.
AGREED = ("same adapter first", "correlation of maps", "of shares")
# Of gradients in boxes, and what each is.
BOX_METHODS = {
    "norm": "norm of the gradient over the norm of the update, as published",
    "factor_norm": "the same of the factors A and B",
    "directional": "scale times derivative by the scale",
    "integrated": "the same, averaged from scale 0 to the adapter's own",
}


def attribution_sections(
    spec: AttributionSpec, done: Mapping[str, Values], folder: Path
) -> list[Section]:
    """Everything that the report says.

    Args:
        spec: of the experiment.
        done: stage -> what it found.
        folder: of the report, which holds `PICTURE`; charts go there.
    """
    names, pictures = spec.adapters, len(spec.pictures)
    return [
        _introduction(spec, folder),
        Section("True ablation", (_ablation_grid(names, done["ablation"]),)),
        Section("Leaving adapters out late", _late_parts(done["late start"], folder)),
        Section("Blocks that change (activations)", _block_parts(done["blocks"])),
        Section("Sparse codes", _sparse_parts(names, spec.mixture, done["sparse codes"])),
        Section("Gradients in boxes", _box_parts(names, pictures, done["boxes"])),
        Section("Ablation from inverted latents", _inversion_parts(done["inversion"])),
        published_section(spec.source, spec.published),
    ]


def _introduction(spec: AttributionSpec, folder: Path) -> Section:
    intro = (
        f"Adapters {', '.join(spec.adapters)} of the bundled testbed at scale {spec.scale:g} on "
        f"{spec.base}; {len(spec.pictures)} pictures: {', '.join(spec.digits)}, seeds per digit: "
        f"{spec.seeds}; {spec.steps} steps, guidance {spec.guidance:g}. True ablation draws the "
        "picture again from the same noise without one adapter; all else is compared with it."
    )
    prompt, _ = spec.pictures[spec.shown]
    legend = (
        f"`{prompt}`: with all adapters, and with none; then without each: "
        "the picture, what that changed, and the change over the picture."
    )
    return Section("What this is", (intro, Figure(folder / PICTURE, legend)))


def _ablation_grid(names: Sequence[str], found: Values) -> Grid:
    rows = tuple(
        (Cell(name), Cell(f"{100 * share:.1f} ± {100 * spread:.1f}"), Cell(str(first)))
        for name, share, spread, first in zip(
            names, found["shares"], found["spread"], found["first"], strict=True
        )
    )
    caption = "Share of the sum of effects, percent, ± standard deviation over pictures."
    return Grid(("adapter", "share", "pictures where it is first"), rows, caption)


def _late_parts(found: Values, folder: Path) -> tuple[Any, ...]:
    rows = found["rows"]
    n = rows[0][-1]
    series = {
        "correlation of maps": [(100 * cost, maps, 0.0) for _, cost, _, maps, *_ in rows],
        "same adapter first": [
            (100 * cost, top, (top * (1 - top) / n) ** 0.5) for _, cost, top, *_ in rows
        ],
    }
    chart = chart_trade(
        series,
        folder / "late.png",
        title=f"Agreement with true ablation, n = {n} pictures",
        xlabel="calls of the model, percent of true ablation",
        ylabel="agreement",
    )
    cells = tuple(
        tuple(map(Cell, (f"{100 * start:.0f} %", f"{100 * cost:.0f} %", *_agreed(agreed))))
        for start, cost, *agreed in rows
    )
    head = ("left out from", "cost", *AGREED)
    said = "What the first steps settle stays, whoever is left out later."
    return Grid(head, cells, "Against true ablation."), Figure(chart, said)


def _agreed(values: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" for value in values[:3]]


def _block_parts(found: Values) -> tuple[Any, ...]:
    columns = zip(*(found[key] for key in ("blocks", "forced", "free", "all", "safe")), strict=True)
    rows = tuple(
        (
            Cell(block),
            Cell(f"{100 * forced:.2f} %"),
            Cell(f"{100 * free:.2f} %"),
            Cell(f"{100 * change:.1f} %"),
            Cell("yes" if safe else "no"),
        )
        for block, forced, free, change, safe in columns
    )
    head = ("block", "at the same latents", "on own trajectories", "change by all", "cache-safe")
    caption = (
        "Relative variance of a block's output over each adapter alone and all together: mean over "
        "configurations of the squared distance from their mean, over its square. Change by all: "
        "distance from the output without adapters, over its norm, at the same latents. "
        "Cache-safe: no configuration changes it by more than 1 %."
    )
    text = (
        "On trajectories of their own the latents part too, so that every block seems to change, "
        "even the first, which has no adapter; the published numbers may include that."
    )
    return Grid(head, rows, caption), text


def _sparse_parts(names: Sequence[str], scales: Sequence[float], found: Values) -> tuple[Any, ...]:
    head = ["adapter", "true scale"]
    columns: list[list[str]] = []
    for name in ("codes", "activations"):
        for kind, says in (("unit", "references at scale 1"), ("own", "at their own, over 1")):
            head.append(f"{name}, {says}")
            mean, spread = found[name][kind]
            columns.append([f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, spread, strict=True)])
    rows = tuple(
        tuple(map(Cell, row))
        for row in zip(names, (f"{s:g}" for s in scales), *columns, strict=True)
    )
    caption = (
        "Least squares of the mixture's change on each adapter's own, mean ± standard deviation "
        "over pictures. With references at their own scales the weights would be 1 did changes add."
    )
    text = (
        f"512 codes, {found['vectors']} vectors; held-out R2 {found['r2']:.3f}. Distance of the "
        f"mixture from the sum of its parts: {found['codes']['additivity']:.2f} in codes, "
        f"{found['activations']['additivity']:.2f} in the activations themselves. "
        "Of the changes of the activations those of the latents explain R2 "
        f"{found['latent_r2']:.2f} (ridge, on pictures left out; below 0: nothing)."
    )
    return Grid(tuple(head), rows, caption), text


def _box_parts(names: Sequence[str], pictures: int, found: Values) -> tuple[Any, ...]:
    right = [found[method]["right"] for method in BOX_METHODS]
    cells = ranked(right, [f"{100 * share:.0f} %" for share in right])
    rows = []
    for (method, says), cell in zip(BOX_METHODS.items(), cells, strict=True):
        shares = (" / ".join(f"{100 * s:.0f}" for s in box) for box in found[method]["shares"])
        rows.append((Cell(method), Cell(says), cell, *map(Cell, shares)))
    owners = [names[int(np.argmax(counts))] for counts in found["owners"]]
    boxes = [f"box {k + 1} ({owner})" for k, owner in enumerate(owners)]
    grid = Grid(
        ("score", "what it is", "right", *boxes),
        tuple(rows),
        f"Right: boxes whose first adapter is that of true ablation there, of {pictures} "
        f"pictures with {len(owners)} boxes each. Then mean shares of {' / '.join(names)} in each "
        "box, percent; in brackets the adapter that ablation finds there most often.",
        2,
    )
    text = (
        "By the chain rule the gradient of an update is its scale times that of the weight it is "
        "added to, whatever the box, so the published score orders adapters of equal scale by "
        "their norms alone."
    )
    return grid, text


def _inversion_parts(found: Values) -> tuple[Any, ...]:
    rows = tuple(
        (Cell(name), *map(Cell, _agreed(values))) for name, values in found["rows"].items()
    )
    caption = (
        "Against true ablation. Cached: the latents that the picture went through; inverted: those "
        f"that DDIM inversion finds with up to {found['iterations']} fixed-point iterations per "
        f"step, guided as the picture; its noise is off by {100 * found['noise_error']:.2f} %."
    )
    text = (
        "With exact latents the late start alone explains what is lost: inversion is not to blame."
    )
    return Grid(("latents", *AGREED), rows, caption), text
