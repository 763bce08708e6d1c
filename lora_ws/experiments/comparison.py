"""What `lora-ws train` leaves: readers of the same rows side by side, and a page of the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lora_ws import journal
from lora_ws.bundle import Bundle
from lora_ws.bundle.evidence import layer_evidence
from lora_ws.collection import AdapterSet, load
from lora_ws.experiments.maps import draw_map, map_rows
from lora_ws.learn.features import open_data, split_rows
from lora_ws.learn.run import best_run
from lora_ws.learn.run_folder import BUNDLE, CONFIG, CURVES, PLOTS, RECORDS
from lora_ws.learn.spec import ExperimentSpec, slug
from lora_ws.report.charts import chart_curves, chart_layers
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.metrics import metric_of, metrics_of
from lora_ws.report.page import Facts, Figure, Section, write_report
from lora_ws.report.records import RunRecord, read_records
from lora_ws.report.tables import headline, majority, results_grid

PAGE = "report.html"
# Test rows whose verdicts are taken apart: each asks the classifier once a layer.
TAKEN_APART = 50


@dataclass(frozen=True)
class Comparison:
    """Experiments on the same rows.

    Attributes:
        spec: names the rows: data, subset, split and label.
        folder: of the page and its images.
        homes: experiment -> folder of its run.
        groups: experiment -> records of its seeds.
        best: the one that validation rows prefer.
        grid: their table.
        references: accuracy of what they are held against, by name.
    """

    spec: ExperimentSpec
    folder: Path
    homes: Mapping[str, Path]
    groups: Mapping[str, Sequence[RunRecord]]
    best: str
    grid: Grid
    references: Mapping[str, float]

    @classmethod
    def of(cls, spec: ExperimentSpec, asked: Mapping[str, Path], folder: Path) -> "Comparison":
        """Read the runs of a folder that are about the same rows of the same data.

        Args:
            spec: names the rows.
            asked: folders of the runs that were asked for, by title; the others are called what
                they are.
            folder: that holds a folder of each run.
        """
        held = {file.parent: read_records(file) for file in sorted(folder.glob(f"*/{RECORDS}"))}
        own = held[next(iter(asked.values()))][0]
        titles = {home: title for title, home in asked.items()}
        others = [home for home, records in held.items() if records and home not in titles]
        same = [home for home in others if _rows(held[home][0]) == _rows(own)]
        homes = {
            _title(titles.get(home), held[home][0].name, home.name): home
            for home in (*titles, *same)
        }
        groups = {title: held[home] for title, home in homes.items()}
        references = _references(spec, own)
        grid = results_grid(groups, references)
        return cls(spec, folder, homes, groups, best_run(groups), grid, references)

    @property
    def first(self) -> RunRecord:
        """A record of the best one."""
        return self.groups[self.best][0]

    @property
    def current(self) -> bool:
        """Whether the page was written after all records."""
        page = self.folder / PAGE
        made = [(home / RECORDS).stat().st_mtime for home in self.homes.values()]
        return page.is_file() and page.stat().st_mtime >= max(made)


def write_page(runs: Comparison) -> Path:
    """Write the page: table, curves, errors, reliability, map, layers; only if there is news.

    Returns:
        The HTML file.
    """
    if not runs.current:
        first = runs.first
        title = f"Readers of {first.dataset}" + (f", {first.subset}" if first.subset else "")
        write_report(runs.folder, title, _sections(runs))
    return runs.folder / PAGE


def _rows(record: RunRecord) -> tuple[Any, ...]:
    return record.data_version, record.task, record.classes


def _title(title: str | None, name: str, folder: str) -> str:
    """What a run is called, and the settings that its folder's name adds."""
    settings = folder.removeprefix(slug(name)).lstrip("-")
    return ", ".join(filter(None, [title or name, settings]))


def _references(spec: ExperimentSpec, record: RunRecord) -> dict[str, float]:
    """Accuracy of guessing, and of what the card says of the same question."""
    if not record.confusion:
        return {}
    card = load(spec.dataset, revision=spec.revision).card
    found, split = {"chance": majority(record)}, spec.split or card.split.column
    if spec.label in (None, card.label) and not (spec.shuffle_labels or spec.first_rows):
        shares = {name: by.get(split or "") for name, by in card.references.items()}
        found |= {name: share for name, share in shares.items() if share is not None}
    return found


def _sections(runs: Comparison) -> list[Section]:
    sections = [_result(runs), Section("Training", (_curves(runs),))]
    home = runs.homes[runs.best]
    if errors := _errors(runs, home):
        sections.append(Section(f"Where {runs.best} errs", errors))
    if runs.first.confusion and (home / BUNDLE).is_dir():
        bundle = Bundle.load(home / BUNDLE, allow_classes=_classes(home))
        adapters, _ = open_data(runs.spec)
        labels, names = runs.spec.kind.read(adapters, runs.spec.label)
        # Dots have one colour: of several tasks, or several labels, there is no map.
        if labels.ndim == 1:
            figure = _map(runs, bundle, adapters, labels, names)
            sections.append(Section("Map of the adapters", (figure,)))
        sections.append(Section("Which layers", (_layers(runs, bundle, adapters),)))
    return sections


def _classes(home: Path) -> tuple[str, ...]:
    """What the run's own spec names; its bundle may name no more."""
    config = yaml.safe_load((home / CONFIG).read_text(encoding="utf-8"))
    return tuple(config[key]["class_path"] for key in ("featurizer", "model") if config.get(key))


def _result(runs: Comparison) -> Section:
    first = runs.first
    main = metrics_of([runs.groups[runs.best]])[0]
    name, quality = metric_of(main).name, headline(runs.groups[runs.best])
    tiles = {f"{runs.best}: {name}": Cell(quality.removeprefix(f"test {name} "))}
    if main == "accuracy":
        tiles |= {name: Cell(f"{100 * value:.0f} %") for name, value in runs.references.items()}
    text = (
        "Predictions about the photos of an adapter, from its weights alone. "
        f"{runs.best} is best on the validation rows; test rows took no part in this choice."
    )
    data = f"{first.n_train} rows to train, {first.n_val} to validate, {first.n_test} to test"
    made = Facts({"data": Cell(f"{first.dataset}, version {first.data_version[:12]}; {data}")})
    return Section("Result", (text, Facts(tiles, tiles=True), runs.grid, made))


def _curves(runs: Comparison) -> Figure:
    curves = {
        name: [line["curves"] for line in journal.read(home / CURVES)]
        for name, home in runs.homes.items()
    }
    n = max(map(len, curves.values()))
    # What is solved at once has no curve.
    curves = {name: seeds for name, seeds in curves.items() if len(seeds[0]) > 1}
    if curves and all("val_accuracy" in seeds[0][0] for seeds in curves.values()):
        return Figure(
            chart_curves(curves, runs.folder / PLOTS[0], title=f"Mean and range, {n} seeds"),
            "Mean and range over seeds, as far as half of them still train. A classifier that is "
            "solved at once has no curve.",
            "Validation loss and accuracy of each reader by epoch.",
        )
    return Figure(runs.homes[runs.best] / PLOTS[0], f"{runs.best}: a line per seed.")


def _errors(runs: Comparison, home: Path) -> tuple[Figure, ...]:
    n = len(runs.groups[runs.best])
    seeds = f"{n} seeds" if n > 1 else "one seed"
    texts = (
        f"Test rows by true class (row) and predicted class (column), {seeds} together.",
        "How often the predicted class is right by predicted probability, on the test rows: before "
        "and after calibration on the validation rows. Dotted: perfect calibration.",
    )
    pairs = zip(PLOTS[1:], texts, strict=True)
    return tuple(Figure(home / name, text) for name, text in pairs if (home / name).is_file())


def _map(
    runs: Comparison,
    bundle: Bundle,
    adapters: AdapterSet,
    labels: np.ndarray,
    names: tuple[str, ...],
) -> Figure:
    rows = map_rows(len(adapters))
    features = np.array(bundle.featurizer.transform(np.array(adapters.weights[rows])), np.float32)
    with torch.inference_mode():
        embedded = bundle.network.embed(torch.from_numpy(features)).numpy()
    file = draw_map(embedded, labels[rows], names, runs.folder / "map.png")
    return Figure(
        file,
        f"Every adapter, as {runs.best} sees it, laid out by t-SNE without looking at labels, "
        "also those it was trained on.",
        "Adapters as dots, coloured by class.",
    )


def _layers(runs: Comparison, bundle: Bundle, adapters: AdapterSet) -> Figure:
    test = split_rows(adapters, runs.spec).test
    rows = test[np.linspace(0, len(test) - 1, min(len(test), TAKEN_APART)).astype(int)]
    found = [layer_evidence(bundle, np.array(adapters.weights[row])) for row in rows]
    table = np.array([list(one.values()) for one in found])
    points = zip(table.mean(0).tolist(), table.std(0).tolist(), strict=True)
    file = chart_layers(
        dict(zip(found[0], points, strict=True)),
        runs.folder / "layers.png",
        title=f"What each layer adds, n = {len(rows)} test adapters",
        chance=None,
        xlabel="log-odds lost without it, nats",
    )
    return Figure(
        file,
        f"By how much the log-odds of the verdict fall where a layer's update is taken away: mean "
        f"and standard deviation over {len(rows)} test adapters. Layers that say the same seem "
        f"to add little each; {len(bundle.layers)} of {len(bundle.layout.layers)} are read.",
        "A mark per layer, with the standard deviation.",
    )
