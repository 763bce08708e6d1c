"""What each layer tells: one experiment a layer, a matrix, or a set of layers left out."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_ws.collection import AdapterSet
from lora_ws.config import class_path, parse_shard
from lora_ws.errors import ConfigError
from lora_ws.experiments.spec import Over, SweepSpec, cores
from lora_ws.experiments.tasks import Task, read, run_tasks
from lora_ws.learn.features import open_data
from lora_ws.learn.spec import ExperimentSpec, slug
from lora_ws.report.charts import chart_layers, chart_lines, layer_kind
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.records import RunRecord, Summary, summarise
from lora_ws.report.tables import majority

LEAVE_OUT = (1, 2, 4, 8, 16, 32)


class Point(NamedTuple):
    """One place of a sweep and the records of its seeds."""

    name: str
    records: list[RunRecord]

    def summary(self, part: str) -> Summary:
        """Accuracy over the seeds."""
        return summarise(self.records, "accuracy", part)

    def percent(self, part: str) -> tuple[float, float]:
        """Mean and standard deviation of accuracy."""
        return self.summary(part).percents


def run_sweep(spec: SweepSpec, folder: Path) -> list[Point]:
    """Do what is not done yet of a sweep, and read all of it that there is.

    Args:
        spec: what to vary, and the experiment.
        folder: of the sweep over layers; what leaves out its best layers stands beside it.

    Raises:
        ConfigError: the representation cannot be limited to some matrices, or layers that are to
            be left out were not measured.
    """
    experiment = spec.experiment()
    zoo, _ = open_data(experiment)
    places = _places(spec, zoo, folder)
    tasks = [
        Task(_on(experiment, patterns), folder / spec.over / slug(name))
        for name, patterns in places.items()
    ]
    first, count = parse_shard(spec.shard)
    run_tasks(tasks[first::count], cores(spec.processes), f"sweep over {spec.over}")
    points = [Point(name, t.records) for name, t in zip(places, tasks, strict=True)]
    return [point for point in points if point.records]


def sweep_grid(points: Sequence[Point], top: int) -> Grid:
    """The best places by validation accuracy, with their test accuracy."""
    best = top_points(points, top)
    val = [point.summary("val") for point in best]
    test = [point.summary("test") for point in best]
    columns = [
        [Cell(point.name) for point in best],
        [Cell(layer_kind(point.name)) for point in best],
        [Cell(str(point.records[0].dim)) for point in best],
        ranked([s.mean for s in val], [s.percent() for s in val]),
        ranked([s.mean for s in test], [s.percent() for s in test]),
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


def top_points(points: Sequence[Point], top: int) -> list[Point]:
    """The best by validation accuracy, ties by validation loss; test rows have no say."""

    def rank(point: Point) -> tuple[float, float]:
        losses = [record.val_loss for record in point.records]
        return -point.summary("val").mean, sum(losses) / len(losses)

    return sorted(points, key=rank)[:top]


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


def _places(spec: SweepSpec, zoo: AdapterSet, folder: Path) -> dict[str, tuple[str, ...]]:
    """Name of each place -> the matrices it reads."""
    layers = [layer.name for layer in zoo.layout.layers]
    if spec.over == "layers":
        return {name: (name,) for name in layers}
    if spec.over == "matrices":
        return {matrix.name: (matrix.name,) for matrix in zoo.layout.matrices}
    seeds, home = spec.experiment().seeds, folder / "layers"
    measured = [Point(name, read(home / slug(name), seeds)) for name in layers]
    if missing := [point.name for point in measured if not point.records]:
        raise ConfigError(
            f"over=all_but_top: expected a finished sweep over layers in {home}, got "
            f"none of `{missing[0]}`; run the sweep with --over layers first"
        )
    ordered = [point.name for point in top_points(measured, len(measured))]
    return {f"without-{k}": tuple(sorted(ordered[k:])) for k in LEAVE_OUT if k < len(ordered)}


def _on(spec: ExperimentSpec, patterns: tuple[str, ...]) -> ExperimentSpec:
    featurizer = spec.featurizer
    if "matrices" not in spec.parameters:
        named = class_path(featurizer) if featurizer is not None else "none"
        raise ConfigError(
            f"featurizer: expected one that takes `matrices`, got {named}; sweep FlatVec, say"
        )
    return spec.vary(matrices=patterns)
