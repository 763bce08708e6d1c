"""The sections of a figure of layers, and of a sweep: chart, table, comma-separated values."""

import csv
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from lora_ws.experiments.layers.spec import LayersSpec, Over
from lora_ws.experiments.layers.sweep import Point, top_points
from lora_ws.report.charts import chart_layers, chart_lines, layer_kind
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.metrics import METRICS
from lora_ws.report.page import Figure, Section
from lora_ws.report.tables import majority

ACCURACY = METRICS["accuracy"]
TITLES: dict[Over, str] = {
    "layers": "Each layer, A and B together",
    "matrices": "Each matrix alone",
    "all_but_top": "All but the best layers",
}


def layers_section(
    spec: LayersSpec, over: Over, points: Sequence[Point], top: int, folder: Path
) -> Section:
    """One sweep of the figure.

    Args:
        spec: of the figure.
        over: what was swept over.
        points: of the sweep.
        top: how many of the best to list.
        folder: of the report; the chart and all numbers as CSV go there.
    """
    chart = sweep_chart(points, over, folder / f"{over}.png")
    write_csv(points, folder / f"{over}.csv")
    caption = f"{TITLES[over]}: accuracy, mean and standard deviation over seeds."
    parts: list[str | Grid | Figure] = [Figure(chart, caption)]
    if over != "all_but_top":
        parts.append(sweep_grid(points, top))
    if over == "layers":
        parts.append(_claims(spec, points))
    return Section(TITLES[over], tuple(parts))


def sweep_grid(points: Sequence[Point], top: int) -> Grid:
    """The best places by validation accuracy, with their test accuracy."""
    best = top_points(points, top)
    val = [point.summary("val") for point in best]
    test = [point.summary("test") for point in best]
    columns = [
        [Cell(point.name) for point in best],
        [Cell(layer_kind(point.name)) for point in best],
        [Cell(str(point.records[0].dim)) for point in best],
        ACCURACY.column(val),
        ACCURACY.column(test),
    ]
    first = best[0].records[0]
    caption = (
        f"The {len(best)} of {len(points)} that are best by validation accuracy; mean ± sample "
        f"standard deviation over {val[0].n} seeds, percent; {first.dataset} {first.subset}, "
        f"{first.n_train}/{first.n_val}/{first.n_test} rows, protocol {first.protocol}, engine "
        f"{first.engine}. Guessing the largest class scores {100 * majority(first):.1f} %. The "
        "best of many is the best partly by luck."
    )
    head = ("Where", "Kind", "Numbers", "Validation", "Test")
    return Grid(head, tuple(zip(*columns, strict=True)), caption)


def sweep_chart(points: Sequence[Point], over: Over, file: Path) -> Path:
    """The picture of a sweep."""
    chance = 100 * majority(points[0].records[0])
    parts = {"test": "test", "validation": "val"}
    if over == "all_but_top":
        lines = {
            part: {int(p.name.split("-")[1]): p.percent(key) for p in points}
            for part, key in parts.items()
        }
        label = "how many of the best layers are left out"
        return chart_lines(lines, file, chance=chance, xlabel=label)
    values = {part: [p.percent(key) for p in points] for part, key in parts.items()}
    return chart_layers([p.name for p in points], values, file, chance=chance)


def write_csv(points: Sequence[Point], file: Path) -> Path:
    """One line a place: kind, length, seeds, accuracy (0 to 1) with standard deviation."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        columns = ("val_mean", "val_std", "test_mean", "test_std")
        writer.writerow(["name", "kind", "numbers", "seeds", *columns])
        for point in points:
            val, test = point.summary("val"), point.summary("test")
            numbers = [f"{v:.6g}" for v in (val.mean, val.std, test.mean, test.std)]
            kind = layer_kind(point.name)
            writer.writerow([point.name, kind, point.records[0].dim, test.n, *numbers])
    return file


def _claims(spec: LayersSpec, points: Sequence[Point]) -> Grid:
    """What the paper's text states of layers, beside the best layer of that kind here."""
    dataset = points[0].records[0].dataset
    rows = []
    for claim in spec.published:
        fitting = [p for p in points if fnmatchcase(p.name, claim.where)]
        tests = [p.summary("test") for p in fitting]
        best = max(tests, key=lambda s: s.mean)
        middle = 100 * float(np.median([s.mean for s in tests]))
        here = f"best {best.percent()}, median {middle:.1f}"
        data = here if dataset == claim.dataset else "needs the Hub"
        rows.append(
            (Cell(claim.claim), Cell(claim.where), Cell(f"{claim.accuracy:.2f}"), Cell(data))
            + ((Cell(here),) if dataset != claim.dataset else ())
        )
    head = ["Published", "Layers", "Accuracy", f"measured on {spec.published[0].dataset}"]
    if dataset != spec.published[0].dataset:
        head.append(f"measured on {dataset}")
    return Grid(tuple(head), tuple(rows), f"Percent. Published: {spec.source}.")
