"""The sections of the report on attribution, one per stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ws.experiments.attribution.spec import (
    CACHED,
    INVERTED,
    ORIGINAL,
    UNGUIDED,
    AttributionSpec,
    Values,
)
from lora_ws.experiments.attribution.statements import statements_of
from lora_ws.experiments.quoted import published_section
from lora_ws.experiments.statements import statement_tiles, statements_grid
from lora_ws.report.charts import chart_trade
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.page import Figure, Section

PICTURE = "pictures.png"
# What `Agreement` says, in its order.
AGREED = ("same adapter first", "correlation of maps", "of shares")
# Of latents that adapters are left out from.
WHERE = {
    CACHED: "those that the image went through",
    INVERTED: "DDIM inversion with fixed-point iterations, guided as the image",
    UNGUIDED: "DDIM inversion as published, without guidance",
    ORIGINAL: "the same, compared with the image itself, as the post does",
}
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
    names = spec.adapters
    inverted, statements = done["inversion"], statements_of(spec, done)
    return [
        Section("Summary", (statement_tiles(statements), *_introduction(spec, folder))),
        Section("What the post states", (statements_grid("the post", statements), DIFFERENT)),
        Section("True ablation", (_ablation_grid(names, done["ablation"]),)),
        Section("Leaving adapters out late", _late_parts(spec, inverted["rows"])),
        Section("Blocks that change (activations)", _block_parts(spec, done["blocks"])),
        Section("Sparse codes", _sparse_parts(names, spec.mixture, done["sparse codes"])),
        Section("Gradients in boxes", _box_parts(spec, done["boxes"])),
        Section("Ablation from inverted latents", _inversion_parts(spec, inverted, folder)),
        published_section(spec.source, spec.published),
    ]


# Where this experiment is not the post's, beside base and adapters.
DIFFERENT = (
    "Different here: images are of ten prompts that differ in a digit, not of general ones; "
    "sparse codes are learned from images of the same ten prompts and other noise, where the "
    "post has 100 prompts; boxes lie where adapters act by construction, none is drawn by hand; "
    "and scales are such that each adapter leads about as often (chosen on images of other "
    "noise), so that naming the first adapter is no foregone conclusion. The post does not say "
    "how its inversion is guided, with which prompt and adapters it inverts, which variance its "
    "first experiment divides by what, or what 3.75 % is a share of: of 20 images it is none."
)


def _introduction(spec: AttributionSpec, folder: Path) -> tuple[str, Figure]:
    scales = ", ".join(
        f"{name} at {scale:g}" for name, scale in zip(spec.adapters, spec.scales, strict=True)
    )
    counts = ", ".join(f"{stage} {n}" for stage, n in spec.pictures.items())
    intro = (
        f"Adapters of the bundled testbed on {spec.base}: {scales}. Images: {counts}; each is "
        f"`a photo of` {', '.join(spec.digits)}, {spec.steps} steps, guidance {spec.guidance:g}. "
        "True ablation draws the image again from the same noise without one adapter; all else "
        "is compared with it."
    )
    prompt, _ = spec.drawn("ablation")[spec.shown]
    legend = (
        f"`{prompt}`: with all adapters, and with none; then without each: "
        "the image, what that changed, and the change over the image."
    )
    return intro, Figure(folder / PICTURE, legend)


def _ablation_grid(names: Sequence[str], found: Values) -> Grid:
    rows = tuple(
        (Cell(name), Cell(f"{100 * share:.1f} ± {100 * spread:.1f}"), Cell(str(first)))
        for name, share, spread, first in zip(
            names, found["shares"], found["spread"], found["first"], strict=True
        )
    )
    majority = max(found["first"]) / sum(found["first"])
    caption = (
        "Share of the sum of effects, percent, ± standard deviation over images. Always naming "
        f"the same adapter would be right in {100 * majority:.0f} %."
    )
    return Grid(("adapter", "share", "images where it is first"), rows, caption)


def _late_parts(spec: AttributionSpec, rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    # With all adapters, with none, and without each: all but one are saved until the start.
    saved = (len(spec.adapters) + 1) / (len(spec.adapters) + 2)
    cells = tuple(
        tuple(
            map(
                Cell,
                (
                    f"{100 * (1 - left / spec.steps):.0f} %",
                    f"{100 * (1 - saved * (1 - left / spec.steps)):.0f} %",
                    *_agreed(agreed),
                ),
            )
        )
        for name, left, *agreed in reversed(rows)
        if name == CACHED
    )
    head = ("left out from", "cost", *AGREED)
    caption = (
        "Against true ablation; cost: calls of the model. What the first steps settle stays, "
        "whoever is left out later. " + _majority(rows)
    )
    return (Grid(head, cells, caption),)


def _majority(rows: Sequence[Sequence[Any]]) -> str:
    *_, pictures, majority = rows[0]
    return (
        f"n = {pictures} images; always naming the same adapter is right in {majority:.2f} of them."
    )


def _agreed(values: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" for value in values[:3]]


def _block_parts(spec: AttributionSpec, found: Values) -> tuple[Any, ...]:
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
        "Relative variance of a block's output over no adapter, each alone and all together, at "
        f"scale {spec.block_scale:g}: mean over configurations of the squared distance from their "
        "mean, over its square. Change by all: distance from the output without adapters, over its "
        "norm, at the same latents. "
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
        "over images. With references at their own scales the weights would be 1 did changes add."
    )
    text = (
        f"512 codes, learned from {found['vectors']} vectors of the base on other images; R2 "
        f"{found['r2']:.3f} of vectors held out. From changes of codes ridge explains changes of "
        f"activations with R2 {found['code_r2']:.2f}, on images left out. Distance of the "
        f"mixture from the sum of its parts: {found['codes']['additivity']:.2f} in codes, "
        f"{found['activations']['additivity']:.2f} in the activations themselves."
    )
    return Grid(tuple(head), rows, caption), text


def _box_parts(spec: AttributionSpec, found: Values) -> tuple[Any, ...]:
    names = spec.adapters
    right = [found[method]["right"] for method in BOX_METHODS]
    cells = ranked(right, [f"{100 * share:.0f} %" for share in right])
    rows = []
    for (method, says), cell in zip(BOX_METHODS.items(), cells, strict=True):
        own = " / ".join(f"{100 * share:.0f}" for share in found[method]["own"])
        shares = (" / ".join(f"{100 * s:.0f}" for s in box) for box in found[method]["shares"])
        rows.append((Cell(method), Cell(says), cell, *map(Cell, (own, *shares))))
    owners = [sum(column) for column in zip(*found["owners"], strict=True)]
    placed = sum(found["owners"][k][k] for k in range(len(names)))
    every = " / ".join(names)
    grid = Grid(
        ("score", "what it is", "right", "own boxes", *(f"box of {name}" for name in names)),
        tuple(rows),
        f"Right: boxes whose first adapter is that of true ablation there, of {sum(owners)} boxes "
        f"({spec.pictures['boxes']} images); true ablation ascribes "
        f"{' / '.join(map(str, owners))} to {every}, so that always naming the same adapter is "
        f"right in {100 * max(owners) / sum(owners):.0f} %, and naming the one that acts there by "
        f"construction in {100 * placed / sum(owners):.0f} %. Own boxes: percent of the boxes "
        f"where {every} act by construction that are ascribed to them. Then mean shares of {every} "
        "in each box, percent.",
        2,
    )
    text = (
        "By the chain rule the gradient of an update is its scale times that of the weight it is "
        "added to, whatever the box, so the published score orders adapters by scale over norm "
        "alone: that it ascribes all boxes to one of them, and that its shares are the same "
        "everywhere, follows from its formula. The signed derivative knows the box."
    )
    return grid, text


def _inversion_parts(spec: AttributionSpec, found: Values, folder: Path) -> tuple[Any, ...]:
    rows = found["rows"]
    cells = tuple(
        (Cell(name), Cell(WHERE[name]), *map(Cell, (str(left), *_agreed(agreed))))
        for name in WHERE
        for way, left, *agreed in rows
        if way == name
    )
    errors = found["errors"]
    caption = (
        f"Against true ablation. {_majority(rows)} The noise that inversion ends in is off by "
        f"{100 * errors[INVERTED]:.1f} % with up to {spec.fixed_point_iters} iterations per step, "
        f"and by {100 * errors[UNGUIDED]:.0f} % without guidance and iterations."
    )
    series = {
        name: [(left, agreed[1], 0.0) for way, left, *agreed in rows if way == name]
        for name in WHERE
    }
    chart = chart_trade(
        series,
        folder / "late.png",
        title="Maps of late ablation against true ablation",
        xlabel=f"steps left of {spec.steps}",
        ylabel="correlation of maps",
    )
    return Grid(("latents", "what", "steps left", *AGREED), cells, caption, 2), Figure(
        chart, _why(spec, rows)
    )


def _why(spec: AttributionSpec, rows: Sequence[Sequence[Any]]) -> str:
    ends = {
        name: " to ".join(
            f"{r:.2f}" for way, left, _, r, *_ in rows if way == name and left in _ends(spec)
        )
        for name in WHERE
    }
    least, most = _ends(spec)
    return (
        f"With {least} to {most} steps left maps correlate with those of true ablation by "
        f"{ends[CACHED]} from the true latents, {ends[INVERTED]} from inverted ones, and "
        f"{ends[UNGUIDED]} without guidance; compared with the image itself, by "
        f"{ends[ORIGINAL]}. In the last, what inversion loses stands in the maps of all adapters "
        "alike; in the others it does not count, as all images are finished from the same "
        "latents."
    )


def _ends(spec: AttributionSpec) -> tuple[int, int]:
    return min(spec.left), max(spec.left)
