"""Sweeps: the same experiment on each layer, on each matrix, or with layers left out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lora_ws.collection import AdapterSet
from lora_ws.config import parse_shard
from lora_ws.errors import ConfigError
from lora_ws.experiments.layers.spec import SweepSpec
from lora_ws.experiments.recipes import cores
from lora_ws.experiments.trials import Trial, first_records, run_trials
from lora_ws.learn.features import open_data
from lora_ws.learn.run_folder import CONFIG, changed_settings, folder_beside
from lora_ws.learn.spec import slug
from lora_ws.report.metrics import metric_of, metrics_of
from lora_ws.report.records import RunRecord, Summary, summarise

LEAVE_OUT = (1, 2, 4, 8, 16, 32)


class Point(NamedTuple):
    """One selection of matrices, by name, and the records of its seeds."""

    name: str
    records: list[RunRecord]

    @property
    def metric(self) -> str:
        """Name of the first metric of its records, by which selections are compared."""
        return metrics_of([self.records])[0]

    def summary(self, part: str) -> Summary:
        """That metric over the seeds."""
        return summarise(self.records, self.metric, part)


def sweep_folder(spec: SweepSpec, home: Path) -> Path:
    """Choose the folder of a sweep: its home, unless that holds one with other settings.

    Args:
        spec: the sweep.
        home: where it goes if nothing else is there.

    Returns:
        ``home``, or a folder beside it, named as by `lora_ws.learn.run_folder.folder_for`.
    """
    files = sorted(home.glob(f"*/*/{CONFIG}"))
    changed = changed_settings(spec.experiment(), files[0]) if files else {}
    return folder_beside(home, {key: changed[key] for key in changed if key != "matrices"})


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
    adapters, _ = open_data(experiment)
    selections = _selections(spec, adapters, folder)
    trials = [
        Trial(replace(experiment, matrices=patterns), folder / spec.over / slug(name))
        for name, patterns in selections.items()
    ]
    first, count = parse_shard(spec.shard)
    run_trials(trials[first::count], cores(spec.processes), f"sweep over {spec.over}")
    points = [Point(name, t.records()) for name, t in zip(selections, trials, strict=True)]
    return [point for point in points if point.records]


def top_points(points: Sequence[Point], top: int) -> list[Point]:
    """The best by the metric on validation rows, ties by their loss; test rows have no say."""

    def rank(point: Point) -> tuple[float, float]:
        losses = [record.val_loss for record in point.records]
        mean = point.summary("val").mean
        better = -mean if metric_of(point.metric).higher_is_better else mean
        return better, sum(losses) / len(losses)

    return sorted(points, key=rank)[:top]


def _selections(spec: SweepSpec, adapters: AdapterSet, folder: Path) -> dict[str, tuple[str, ...]]:
    """Name of each selection -> the matrices it reads."""
    layers = [layer.name for layer in adapters.layout.layers]
    if spec.over == "layers":
        return {name: (name,) for name in layers}
    if spec.over == "matrices":
        return {matrix.name: (matrix.name,) for matrix in adapters.layout.matrices}
    seeds, home = spec.experiment().seeds, folder / "layers"
    measured = [Point(name, first_records(home / slug(name), seeds)) for name in layers]
    if missing := [point.name for point in measured if not point.records]:
        raise ConfigError(
            f"over=all_but_top: expected a finished sweep over layers in {home}, got "
            f"none of `{missing[0]}`; run the sweep with --over layers first"
        )
    ordered = [point.name for point in top_points(measured, len(measured))]
    return {f"without-{k}": tuple(sorted(ordered[k:])) for k in LEAVE_OUT if k < len(ordered)}
