"""Measure the rows of a table under each protocol, and its controls."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_ws.adapters import Layout
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.experiments import report
from lora_ws.experiments.options import Options, asked_for
from lora_ws.experiments.recipes import Protocol, fits
from lora_ws.experiments.table.grids import conditions
from lora_ws.experiments.table.layer_choice import choose_layers, detection_sections
from lora_ws.experiments.table.report import Rows, pictures, table_sections
from lora_ws.experiments.table.spec import TableSpec
from lora_ws.experiments.trials import Trial, run_trials
from lora_ws.learn.features import open_data
from lora_ws.report.page import Section
from lora_ws.report.records import RunRecord

Trials = Mapping[str, Trial]


def run(spec: TableSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the table has no row of a name asked for.
    """
    spec = _choose(spec, options.flags.rows)
    adapters, subset = open_data(options.spec(spec.rows[0].recipes["clean"], spec.dataset))
    spec = _readable(spec, options, adapters.layout)
    plan: Mapping[Protocol, Trials] = _plan(spec, options)
    layers: list[Section] = []
    if spec.layer_by:
        plan, layers = choose_layers(plan, options.processes, spec.nested)
    main = next(iter(plan.values()))
    rows = plan.get("clean", main)
    controls = _controls(spec, options, adapters, subset, rows) if options.flags.controls else {}
    trials = [t for found in (*plan.values(), *controls.values()) for t in found.values()]
    run_trials(trials, options.processes, options.name)
    by_protocol: dict[Protocol, Rows] = {p: _records(found) for p, found in plan.items()}
    by_condition = {condition: _records(found) for condition, found in controls.items()}
    figures = pictures(by_protocol, main, options.folder)
    sections = table_sections(spec, by_protocol, by_condition, subset, figures)
    if spec.layer_by:
        sections += [*layers, *detection_sections(plan, options.folder)]
    return report.write(options, spec, sections, trials, next(iter(by_protocol.values())))


def _choose(spec: TableSpec, names: tuple[str, ...] | None) -> TableSpec:
    return replace(spec, rows=asked_for(spec.rows, names, "rows: the table has no"))


def _readable(spec: TableSpec, options: Options, layout: Layout) -> TableSpec:
    """Leave out rows of ours that read layers which these adapters do not have."""
    rows = [
        row
        for row in spec.rows
        if not row.ours or fits(options.spec(row.recipes["clean"], spec.dataset), layout)
    ]
    return replace(spec, rows=tuple(rows))


def _plan(spec: TableSpec, options: Options) -> dict[Protocol, Trials]:
    """Protocol -> row -> trial; what a protocol does not have is left out.

    Raises:
        ConfigError: no row has a recipe for any of the protocols.
    """
    plan: dict[Protocol, Trials] = {}
    for protocol in options.protocols:
        recipes = {
            row.name: row.recipe(protocol, options.flags.dataset or spec.dataset)
            for row in spec.rows
            if protocol == "clean" or not row.ours
        }
        trials = {
            name: Trial(options.spec(recipe, spec.dataset), options.run_folder(recipe), full=True)
            for name, recipe in recipes.items()
            if recipe
        }
        if trials:
            plan[protocol] = trials
    if not plan:
        raise ConfigError(
            f"protocol: {options.name} has no recipe for {', '.join(options.protocols)}"
        )
    return plan


def _controls(
    spec: TableSpec, options: Options, adapters: AdapterSet, subset: str, rows: Trials
) -> dict[str, Trials]:
    """Condition ("" is the table's own) -> row or plain input -> trial."""
    columns = adapters.rows.column_names
    inputs: dict[str, Trial] = {}
    for entry in spec.inputs:
        own = options.spec(entry.recipe, spec.dataset)
        metadata = tuple(name for name in own.metadata if name in columns)
        if metadata or not own.metadata:
            folder = options.run_folder(entry.recipe, adapters.card.name)
            inputs[entry.name] = Trial(replace(own, metadata=metadata), folder)
    found: dict[str, Trials] = {"": inputs}
    for condition in conditions(columns, adapters.card, subset):
        found[condition.name] = {
            name: Trial(replace(trial.spec, **condition.changes), trial.folder / condition.slug)
            for name, trial in {**rows, **inputs}.items()
        }
    return found


def _records(trials: Trials) -> dict[str, list[RunRecord]]:
    return {name: trial.records() for name, trial in trials.items()}
