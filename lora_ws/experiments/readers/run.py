"""Train every reader on every question, and measure what each costs."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import clone

from lora_ws.bundle import Bundle
from lora_ws.bundle.state import fitted_state
from lora_ws.errors import ConfigError
from lora_ws.experiments import report
from lora_ws.experiments.options import Options, asked_for
from lora_ws.experiments.readers.report import Cost, DrawOutcome, draws_grid, readers_sections
from lora_ws.experiments.readers.spec import ColumnSpec, ReaderSpec, ReadersSpec
from lora_ws.experiments.trials import Trial, run_trials
from lora_ws.learn.features import open_data
from lora_ws.learn.run_folder import BUNDLE
from lora_ws.learn.spec import ExperimentSpec, slug
from lora_ws.models import Metanetwork
from lora_ws.report.page import Section
from lora_ws.threads import threads

# What every network draws its learning rate and weight decay from, both on a logarithmic scale.
RATES, DECAYS = (3e-4, 1e-2), (1e-4, 1e-1)
READS = 20


class Draw(NamedTuple):
    """Settings of an optimizer."""

    lr: float
    weight_decay: float


def run(spec: ReadersSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: there is no reader or column of a name asked for, or none of a size.
    """
    spec = _columns(spec, options.flags.columns)
    readers = _choose(spec, options)
    plan = {
        reader.name: {column.name: _trial(spec, reader, column, options) for column in spec.columns}
        for reader in readers
    }
    tried: Mapping[str, Mapping[str, list[Trial]]] = {}
    if options.flags.draws:
        tried = _tried(plan, draws(options.flags.draws))
        every = [trial for row in tried.values() for own in row.values() for trial in own]
        run_trials(every, options.processes, "draws")
        plan = _chosen(plan, tried)
    trials = [trial for row in plan.values() for trial in row.values()]
    run_trials(trials, options.processes, options.name)
    records = {
        name: {column: trial.records() for column, trial in row.items()}
        for name, row in plan.items()
    }
    costs = {name: _cost(row[spec.columns[0].name]) for name, row in plan.items()}
    sections = readers_sections(spec, records, costs, options.folder)
    if tried:
        sections.insert(1, Section("Draws", (draws_grid(_outcomes(plan, tried)),)))
    first, controls = spec.columns[0].name, {one.name for one in spec.groups.get("controls", ())}
    compared = {name: row[first] for name, row in records.items() if name not in controls}
    compared = compared or {name: row[first] for name, row in records.items()}
    return report.write(options, spec, sections, trials, compared)


def draws(count: int) -> list[Draw]:
    """The settings that every network tries, the same for all.

    Example:
        >>> len(draws(8)), draws(8)[:2] == draws(2)
        (8, True)
    """
    uniform = np.random.default_rng(0).random((count, 2))
    ends = np.log([RATES, DECAYS])
    values = np.exp(ends[:, 0] + uniform * (ends[:, 1] - ends[:, 0]))
    return [Draw(*(float(f"{value:.2g}") for value in row)) for row in values]


def _columns(spec: ReadersSpec, names: tuple[str, ...] | None) -> ReadersSpec:
    columns = asked_for(spec.columns, names, "columns: there is no column")
    kept = [spec.columns.index(column) for column in columns]
    elsewhere = {
        name: tuple(values[k] for k in kept) for name, values in spec.measured_elsewhere.items()
    }
    return replace(spec, columns=columns, measured_elsewhere=elsewhere)


def _choose(spec: ReadersSpec, options: Options) -> list[ReaderSpec]:
    rows, size = options.flags.rows, options.flags.size
    chosen = list(asked_for(spec.readers, rows, "rows: there is no reader"))
    if size is None:
        return chosen
    sizes = sorted({name for reader in spec.readers for name in reader.sizes})
    if size not in sizes:
        raise ConfigError(f"size: expected one of {', '.join(sizes)}, got {size}")
    return [reader for reader in chosen if size in reader.sizes]


def _trial(spec: ReadersSpec, reader: ReaderSpec, column: ColumnSpec, options: Options) -> Trial:
    own = options.spec(reader.recipe, spec.dataset)
    seeds, size = options.flags.seeds or spec.seeds, options.flags.size
    model: Any = own.model
    if size is not None:
        sized: Any = clone(model)
        model = sized.set_params(**reader.sizes[size])
    experiment = replace(
        own,
        subset=column.subset,
        split=column.split,
        model=model,
        shuffle_labels=reader.shuffled,
        # A classifier that draws nothing gives the same whatever the seed.
        seeds=seeds if isinstance(model, Metanetwork) or reader.shuffled else 1,
    )
    condition = "-".join((column.subset.replace("/", "-"), column.split or "part"))
    network = (size or "recipe") + ("-shuffled" if reader.shuffled else "")
    return Trial(experiment, options.run_folder(reader.recipe, network, condition), full=True)


def _tried(
    plan: Mapping[str, Mapping[str, Trial]], settings: list[Draw]
) -> dict[str, dict[str, list[Trial]]]:
    """Network -> column -> a trial of one seed per draw."""
    networks = {
        name: row
        for name, row in plan.items()
        if all(isinstance(trial.spec.model, Metanetwork) for trial in row.values())
    }
    return {
        name: {
            column: [_with(trial, setting, "draws", 1) for setting in settings]
            for column, trial in row.items()
        }
        for name, row in networks.items()
    }


def _chosen(
    plan: Mapping[str, Mapping[str, Trial]], tried: Mapping[str, Mapping[str, list[Trial]]]
) -> dict[str, dict[str, Trial]]:
    """Every network with the draw that does best on its validation rows."""
    chosen = {name: dict(row) for name, row in plan.items()}
    for name, row in tried.items():
        for column, own in row.items():
            trial = plan[name][column]
            by = trial.spec.kind.selects
            best = max(own, key=lambda one: one.records()[0].val[by])
            setting = Draw(best.spec.fit.lr, best.spec.fit.weight_decay)
            chosen[name][column] = _with(trial, setting, "chosen", trial.spec.seeds)
    return chosen


def _outcomes(
    plan: Mapping[str, Mapping[str, Trial]], tried: Mapping[str, Mapping[str, list[Trial]]]
) -> list[DrawOutcome]:
    found = []
    for name, row in tried.items():
        for column, own in row.items():
            trial, fit = plan[name][column], plan[name][column].spec.fit
            every = [one.records()[0] for one in own]
            found.append(
                DrawOutcome(name, column, fit.lr, fit.weight_decay, every, trial.records())
            )
    return found


def _with(trial: Trial, setting: Draw, folder: str, seeds: int) -> Trial:
    fit = replace(trial.spec.fit, **setting._asdict(), optimizer="adamw")
    name = slug(f"lr={setting.lr:g},weight_decay={setting.weight_decay:g}")
    spec = replace(trial.spec, fit=fit, seeds=seeds)
    return Trial(spec, trial.folder / folder / name, full=folder == "chosen")


def _cost(trial: Trial) -> Cost:
    """Size of the network, time to train a seed, and time to judge an adapter."""
    records = trial.records()
    seconds = float(np.mean([record.seconds for record in records])) + records[0].feature_seconds
    folder = trial.folder / BUNDLE
    if not folder.is_dir():
        return Cost(math.nan, seconds, math.nan)
    bundle = Bundle.from_pretrained(folder)
    # Not parameters alone: what a normalizer, a kernel machine or a representation keeps as well.
    arrays = [*bundle.tensors.values(), *fitted_state(bundle.featurizer)[0].values()]
    numbers = sum(array.size for array in arrays)
    return Cost(numbers, seconds, _milliseconds(bundle, trial.spec))


def _milliseconds(bundle: Bundle, spec: ExperimentSpec) -> float:
    """CPU time of one adapter's verdict beyond opening its file: the median of several."""
    adapters, _ = open_data(spec)
    rows, taken = np.array(adapters.weights[:READS]), []
    with threads(1), torch.no_grad():
        for k in range(len(rows)):
            start = time.process_time()
            bundle.predict_arrays(rows[k : k + 1], adapters.layout)
            taken.append(time.process_time() - start)
    return 1000 * float(np.median(taken))
