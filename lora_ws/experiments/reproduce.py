"""`reproduce`: run what a table or figure of `eval/` needs, and report it.

Runs stand in ``out/runs/<recipe>``, so that whatever shares a recipe shares its run; a report in
``out/<name>`` holds the records it was made from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_ws.collection import AdapterSet
from lora_ws.config import load_spec, nearest
from lora_ws.errors import ConfigError
from lora_ws.experiments import tables
from lora_ws.experiments.detection import chosen_layers, detection_sections
from lora_ws.experiments.spec import (
    ComponentsSpec,
    LayersSpec,
    Protocol,
    SweepSpec,
    TableSpec,
    eval_file,
    recipe,
    recipe_file,
)
from lora_ws.experiments.sweep import Point, run_sweep, sweep_chart, sweep_grid, write_csv
from lora_ws.experiments.tasks import NOT_APPLICABLE, Task, read, run_tasks
from lora_ws.learn.features import open_data, prepare
from lora_ws.learn.run import CURVES
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.report.charts import chart_bars, chart_curves, chart_lines, chart_map
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.page import Figure, Section, write_report
from lora_ws.report.plots import plot_confusion
from lora_ws.report.records import RunRecord, read_lines, summarise
from lora_ws.report.tables import majority

RECORDS = "records.jsonl"
SWEEPS = {
    "layers": "Each layer, A and B together",
    "matrices": "Each matrix alone",
    "all_but_top": "All but the best layers",
}
NAMES = ("table1", "table2", "figure2", "figure3")


@dataclass(frozen=True)
class Options:
    """What `reproduce` was asked for.

    Attributes:
        out: folder of runs and reports.
        dataset: a collection instead of the one in `eval/`.
        subset: a corner of it; None takes the card's first.
        protocols: of tables; figures take the first.
        seeds: instead of the recipes'.
        processes: how many work at once.
        controls: whether to measure them.
        rows: of a table, by name; None takes all.
    """

    out: Path
    dataset: str | None
    subset: str | None
    protocols: tuple[Protocol, ...]
    seeds: int | None
    processes: int
    controls: bool
    rows: tuple[str, ...] | None = None

    def spec(self, name: str, default: str) -> ExperimentSpec:
        """A recipe on the collection asked for."""
        return recipe(name, self.dataset or default, self.subset, self.seeds)

    def run_folder(self, name: str, *more: str) -> Path:
        """Where the run of a recipe stands; one ``out`` holds one collection and corner."""
        return Path(self.out, "runs", name, *more)


def reproduce(name: str, options: Options) -> Path:
    """Run and report one table or figure; what has been run is not run again.

    Returns:
        The folder of its report.
    """
    if name == "figure2":
        return _figure2(load_spec(LayersSpec, eval_file(name)), options)
    if name == "figure3":
        return _figure3(load_spec(ComponentsSpec, eval_file(name)), options)
    return _table(name, load_spec(TableSpec, eval_file(name)), options)


Rows = Mapping[str, list[RunRecord]]


def _table(name: str, spec: TableSpec, options: Options) -> Path:
    spec = _choose(spec, options.rows)
    zoo, subset = open_data(options.spec(spec.rows[0].recipes["clean"], spec.dataset))
    dataset, folder = options.dataset or spec.dataset, options.out / name
    plan: dict[Protocol, dict[str, Task]] = {}
    for protocol in options.protocols:
        plan[protocol] = {}
        for row in spec.rows:
            found = row.recipe(protocol, dataset)
            if found and not (row.ours and protocol != "clean"):
                own = options.spec(found, spec.dataset)
                plan[protocol][row.name] = Task(own, options.run_folder(found), full=True)
    layers: list[Section] = []
    if spec.layer_by:
        plan, layers = chosen_layers(plan, options.processes, spec.nested)
    controls = _controls(spec, options, zoo, subset, plan) if options.controls else {}
    everything = [task for rows in plan.values() for task in rows.values()]
    everything += [task for rows in controls.values() for task in rows.values()]
    run_tasks(everything, options.processes, name)
    by_protocol: dict[Protocol, Rows] = {
        p: {n: t.records for n, t in rows.items()} for p, rows in plan.items()
    }
    by_control = {c: {n: t.records for n, t in rows.items()} for c, rows in controls.items()}
    sections = _table_sections(spec, folder, by_protocol, plan, by_control, subset)
    if spec.layer_by:
        sections += [*layers, *detection_sections(plan, folder)]
    _write(folder, f"{name}: {spec.title}", spec.source, sections, everything, options.out)
    return folder


def _choose(spec: TableSpec, names: tuple[str, ...] | None) -> TableSpec:
    if names is None:
        return spec
    known = [row.name for row in spec.rows]
    for name in names:
        if name not in known:
            raise ConfigError(f"rows: the table has no `{name}`{nearest(name, known)}")
    return replace(spec, rows=tuple(row for row in spec.rows if row.name in names))


def _controls(
    spec: TableSpec,
    options: Options,
    zoo: AdapterSet,
    subset: str,
    plan: Mapping[Protocol, Mapping[str, Task]],
) -> dict[str, dict[str, Task]]:
    """Condition ("" is the table's own) -> row or plain input -> task."""
    rows = plan.get("clean") or next(iter(plan.values()))
    plain: dict[str, Task] = {}
    for entry in spec.inputs:
        own = options.spec(entry.recipe, spec.dataset)
        columns = [c for c in own.metadata if c in zoo.rows.column_names]
        if own.metadata and not columns:
            continue
        own = replace(own, metadata=tuple(columns))
        plain[entry.name] = Task(own, options.run_folder(entry.recipe, zoo.card.name))
    found = {"": plain}
    for condition in tables.conditions(zoo.rows.column_names, zoo.card.subsets, subset):
        found[condition.name] = {
            name: Task(replace(task.spec, **condition.changes), task.folder / condition.slug)
            for name, task in {**rows, **plain}.items()
        }
    return found


def _table_sections(
    spec: TableSpec,
    folder: Path,
    by_protocol: Mapping[Protocol, Rows],
    plan: Mapping[Protocol, Mapping[str, Task]],
    by_control: Mapping[str, Rows],
    subset: str,
) -> list[Section]:
    main = next(iter(by_protocol))
    rows = by_protocol[main]
    sections = [
        Section(f"Protocol {protocol}", (tables.protocol_grid(spec, found, protocol),))
        for protocol, found in by_protocol.items()
    ]
    if len(by_protocol) > 1:
        grids = [tables.versus_grid(spec, by_protocol, metric) for metric in ("accuracy", "auroc")]
        sections.append(Section("Protocols side by side", tuple(grids)))
    sections.append(Section("Published beside measured", (tables.published_grid(spec, rows),)))
    sections.append(Section("Rows against the best", (tables.paired_grid(rows),)))
    if by_control:
        columns = {
            name: {row: r for row, r in found.items() if row in rows}
            for name, found in by_control.items()
            if name
        }
        plain = {
            name: {row: r for row, r in found.items() if row not in rows}
            for name, found in by_control.items()
        }
        grid = tables.controls_grid(spec, rows, columns, plain, subset)
        text = (
            "What a number means: the same rows where every adapter had the same prompt, from a "
            "shared start, on leaf classes never trained on, and with shuffled labels; and plain "
            "inputs as controls."
        )
        sections.append(Section("Controls", (text, grid)))
    sections.append(Section("Pictures", tuple(_pictures(folder, by_protocol, plan[main]))))
    if notes := [f"{row.name}: {row.note}." for row in spec.rows if row.note]:
        sections.append(Section("Notes", tuple(notes)))
    return sections


def _pictures(
    folder: Path, by_protocol: Mapping[Protocol, Rows], tasks: Mapping[str, Task]
) -> list[Figure]:
    rows = next(iter(by_protocol.values()))
    best = max(rows, key=lambda name: summarise(rows[name], "accuracy", "val").mean)
    first = rows[best][0]
    bars = {p: {n: _percent(r) for n, r in found.items()} for p, found in by_protocol.items()}
    curves = {
        name: [line["curves"] for line in read_lines(task.folder / CURVES)]
        for name, task in tasks.items()
    }
    together = np.sum([record.confusion for record in rows[best]], axis=0).tolist()
    plot_confusion(together, first.classes, folder / "confusion.png")
    n = len(rows[best])
    return [
        Figure(
            chart_bars(bars, folder / "accuracy.png", chance=100 * majority(first)),
            f"Test accuracy, mean and standard deviation over {n} seeds, by protocol.",
        ),
        Figure(
            chart_curves(curves, folder / "curves.png"),
            "Learning curves: mean and range over seeds, as far as half of them still train.",
        ),
        Figure(
            folder / "confusion.png",
            f"Confusion of {best}, the best by validation accuracy: test rows of all {n} seeds.",
        ),
        Figure(
            _map(tasks[best].spec, folder / "map.png"),
            f"All adapters by {best}, laid out by t-SNE without looking at labels.",
        ),
    ]


def _map(spec: ExperimentSpec, file: Path) -> Path:
    from sklearn.manifold import TSNE

    prepared = prepare(spec)
    features = (np.asarray(prepared.features) - prepared.mean) / prepared.scale
    # A layout needs neighbours; thousands of rows more would only hide each other.
    rows = np.linspace(0, len(features) - 1, min(len(features), 2000)).astype(int)
    points = TSNE(init="pca", perplexity=min(30, len(rows) // 4), random_state=0).fit_transform(
        features[rows]
    )
    return chart_map(points, prepared.labels[rows], prepared.classes, file)


def _percent(records: Sequence[RunRecord], part: str = "test") -> tuple[float, float]:
    return summarise(records, "accuracy", part).percents


def _figure2(spec: LayersSpec, options: Options) -> Path:
    folder, sections = options.out / "figure2", []
    home = options.run_folder("figure2")
    tasks: list[Task] = []
    for over, name in spec.recipes.items():
        flags = load_spec(SweepSpec, recipe_file(name))
        flags = replace(
            flags,
            dataset=options.dataset or spec.dataset,
            subset=options.subset,
            seeds=flags.seeds if options.seeds is None else options.seeds,
            processes=options.processes,
        )
        points = run_sweep(flags, home)
        chart = sweep_chart(points, over, folder / f"{over}.png")
        write_csv(points, folder / f"{over}.csv")
        caption = f"{SWEEPS[over]}: accuracy, mean and standard deviation over seeds."
        parts: list[str | Grid | Figure] = [Figure(chart, caption)]
        if over != "all_but_top":
            parts.append(sweep_grid(points, flags.top))
        if over == "layers":
            parts.append(_claims(spec, points))
        sections.append(Section(SWEEPS[over], tuple(parts)))
        tasks += [Task(flags, home / over / p.name) for p in points]
    _write(folder, f"figure2: {spec.title}", spec.source, sections, tasks, options.out)
    return folder


def _claims(spec: LayersSpec, points: Sequence[Point]) -> Grid:
    """What the paper's text states of layers, beside the best layer of that kind here."""
    from fnmatch import fnmatchcase

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


def _figure3(spec: ComponentsSpec, options: Options) -> Path:
    folder, protocol = options.out / "figure3", options.protocols[0]
    name = spec.recipes.get(protocol) or spec.recipes["clean"]
    own = options.spec(name, spec.dataset)
    home = options.run_folder(name)
    if protocol == "as-run":
        # Batches of an incremental fit depend on K, so every K is fitted as the script does.
        tasks = [Task(own.vary(n_components=k), home / f"k{k}") for k in spec.components]
        places = {k: home / f"k{k}" for k in spec.components}
    else:
        tasks = [Task(own, home, components=spec.components)]
        places = dict(zip(spec.components, tasks[0].folders, strict=True))
    run_tasks(tasks, options.processes, "figure3")
    records = {k: read(place, own.seeds) for k, place in places.items()}
    measured = {k: r for k, r in records.items() if r}
    values = {
        part: {k: _percent(r, key) for k, r in measured.items()}
        for part, key in {"test": "test", "validation": "val"}.items()
    }
    first = next(iter(measured.values()))[0]
    chart = chart_lines(
        values, folder / "components.png", chance=100 * majority(first), xlabel="components K"
    )
    caption = "Accuracy over the number of principal components, mean ± standard deviation."
    section = Section("Sweep over K", (Figure(chart, caption), _components(spec, places, records)))
    listed = [Task(own, place) for place in places.values()]
    _write(folder, f"figure3: {spec.title}", spec.source, [section], listed, options.out)
    return folder


def _components(
    spec: ComponentsSpec, places: Mapping[int, Path], records: Mapping[int, list[RunRecord]]
) -> Grid:
    first = next(r for r in records.values() if r)[0]
    columns = [[Cell(str(k)) for k in places]]
    for part in ("val", "test"):
        found = [summarise(r, "accuracy", part) if r else None for r in records.values()]
        why = [_why(place) for place in places.values()]
        texts = [s.percent() if s else w for s, w in zip(found, why, strict=True)]
        columns.append(ranked([s.mean if s else None for s in found], texts))
    head = ["K", "Validation", "Test"]
    for dataset, points in spec.published.items():
        values = [points.get(k) for k in places]
        drawn = ["drawn only" if k in points else "none" for k in places]
        texts = [f"{v:.1f}" if v is not None else d for v, d in zip(values, drawn, strict=True)]
        columns.append(ranked(values, texts))
        head.append(f"{dataset}, published")
    n = len(next(r for r in records.values() if r))
    caption = (
        f"Accuracy in percent, mean ± sample standard deviation over {n} seeds; {first.dataset} "
        f"{first.subset}, {first.n_train} training rows, protocol {first.protocol}. "
        f"Published: {spec.source}"
    )
    return Grid(tuple(head), tuple(zip(*columns, strict=True)), caption)


def _why(place: Path) -> str:
    file = place / NOT_APPLICABLE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "not measured"


def _write(
    folder: Path,
    title: str,
    source: str,
    sections: Sequence[Section],
    tasks: Sequence[Task],
    out: Path,
) -> None:
    """The report and, in one file, every record it was made from."""
    write_report(folder, title, [Section("What this is", (_intro(source),)), *sections])
    lines = []
    for task in {task.folder: task for task in tasks}.values():
        lines += tables.stamp(task.records, task.folder.relative_to(out / "runs"))
    if not lines:
        raise ConfigError(f"{folder}: expected records, found none")
    (folder / RECORDS).write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )


def _intro(source: str) -> str:
    return (
        f"Published numbers: {source.rstrip('.')}. Measured numbers are of the collection and "
        "protocol that each caption names; docs/protocols.md says what the protocols are. Every "
        f"record behind this page stands in {RECORDS} beside it."
    )
