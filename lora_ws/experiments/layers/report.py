"""The sections of a figure of layers, and of a sweep: chart, table, comma-separated values."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from lora_ws.experiments.layers.spec import LayersSpec, Over
from lora_ws.experiments.layers.sweep import Point, top_points
from lora_ws.report.charts import chart_layers, chart_lines
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.metrics import metric_of
from lora_ws.report.modules import layer_kind
from lora_ws.report.page import Figure, Section
from lora_ws.report.tables import majority

TITLES: dict[Over, str] = {
    "layers": "Each layer, A and B together",
    "matrices": "Each matrix alone",
    "all_but_top": "All but the best layers",
}


def layers_section(
    spec: LayersSpec, over: Over, points: Sequence[Point], top: int, folder: Path
) -> Section:
    """One sweep of the figure, beside what is published of layers.

    Args:
        spec: of the figure.
        over: see `sweep_section`, as are the others.
        points: of the sweep.
        top: how many of the best to list.
        folder: of the report.
    """
    section = sweep_section(over, points, top, folder)
    claims = (_claims(spec, points),) if over == "layers" else ()
    return replace(section, parts=section.parts + claims)


def sweep_section(over: Over, points: Sequence[Point], top: int, folder: Path) -> Section:
    """One sweep: its chart and its best selections.

    Args:
        over: what was swept over.
        points: of the sweep.
        top: how many of the best to list.
        folder: the chart and all numbers as CSV go there.
    """
    chart = sweep_chart(points, over, folder / f"{over}.png")
    write_csv(points, folder / f"{over}.csv")
    metric = metric_of(points[0].metric)
    caption = f"{TITLES[over]}: {metric.name}, mean and standard deviation over seeds."
    figure = Figure(chart, caption)
    if over == "all_but_top":
        return Section(TITLES[over], (figure,))
    return Section(TITLES[over], (figure, sweep_grid(points, top)))


def sweep_grid(points: Sequence[Point], top: int) -> Grid:
    """The best selections by the metric on validation rows, with that on test rows."""
    best, metric = top_points(points, top), metric_of(points[0].metric)
    columns = [
        [Cell(point.name) for point in best],
        [Cell(layer_kind(point.name)) for point in best],
        [Cell(str(point.records[0].dim)) for point in best],
        metric.column([point.summary("val") for point in best]),
        metric.column([point.summary("test") for point in best]),
    ]
    first, chance = best[0].records[0], _chance(best)
    caption = (
        f"The {len(best)} of {len(points)} that are best by validation {metric.name}; mean ± "
        f"sample standard deviation over {len(best[0].records)} seeds"
        f"{', percent' if metric.percent else ''}; {first.dataset} {first.subset}, "
        f"{first.n_train}/{first.n_val}/{first.n_test} rows, protocol {first.protocol}, engine "
        f"{first.engine}. "
        + ("" if chance is None else f"Guessing the largest class scores {chance:.1f} %. ")
        + "The best of many is the best partly by luck."
    )
    head = ("Where", "Kind", "Numbers", "Validation", "Test")
    return Grid(head, tuple(zip(*columns, strict=True)), caption, left=2)


def sweep_chart(points: Sequence[Point], over: Over, file: Path) -> Path:
    """The image of a sweep."""
    metric = metric_of(points[0].metric)
    first = points[0].records
    title = f"{TITLES[over]}: {first[0].n_test} test rows, mean ± std of {len(first)} seeds"
    axis: dict[str, Any] = {"title": title, "chance": _chance(points)}
    if over == "all_but_top":
        lines = {
            name: {
                int(point.name.split("-")[1]): metric.on_axis(point.summary(part))
                for point in points
            }
            for name, part in {"test": "test", "validation": "val"}.items()
        }
        xlabel = "how many of the best layers are left out"
        return chart_lines(lines, file, xlabel=xlabel, ylabel=metric.axis, **axis)
    values = {point.name: metric.on_axis(point.summary("test")) for point in points}
    return chart_layers(values, file, xlabel=f"test {metric.axis}", **axis)


def _chance(points: Sequence[Point]) -> float | None:
    """Accuracy of guessing the largest class, in percent; None where there are no classes."""
    first = points[0].records[0]
    return 100 * majority(first) if first.confusion else None


def write_csv(points: Sequence[Point], file: Path) -> Path:
    """Write one line per selection: kind, length, seeds, and the metric with its deviation."""
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
