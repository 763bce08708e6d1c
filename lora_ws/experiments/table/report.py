"""The sections of a table's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lora_ws import journal
from lora_ws.experiments.maps import draw_map, map_rows
from lora_ws.experiments.recipes import Protocol
from lora_ws.experiments.table.grids import (
    controls_grid,
    paired_grid,
    protocol_grid,
    published_grid,
    versus_grid,
)
from lora_ws.experiments.table.spec import TableSpec
from lora_ws.experiments.trials import Trial
from lora_ws.learn.features import prepare
from lora_ws.learn.run_folder import CURVES
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.report.charts import chart_bars, chart_curves
from lora_ws.report.page import Figure, Section
from lora_ws.report.plots import plot_confusion
from lora_ws.report.records import RunRecord, summarise
from lora_ws.report.tables import majority, seed_counts

Rows = Mapping[str, Sequence[RunRecord]]


def table_sections(
    spec: TableSpec,
    by_protocol: Mapping[Protocol, Rows],
    by_condition: Mapping[str, Rows],
    subset: str,
    figures: Sequence[Figure],
) -> list[Section]:
    """Everything that a table's report says of its records.

    Args:
        spec: the table.
        by_protocol: protocol -> row -> records; the first protocol is compared with what is
            published.
        by_condition: condition ("" is the table's own) -> row or plain input -> records; empty
            without controls.
        subset: name of the table's own subset.
        figures: of the first protocol.
    """
    rows = next(iter(by_protocol.values()))
    sections = [
        Section(f"Protocol {protocol}", (protocol_grid(spec, found, protocol),))
        for protocol, found in by_protocol.items()
    ]
    if len(by_protocol) > 1:
        grids = [versus_grid(spec, by_protocol, metric) for metric in ("accuracy", "auroc")]
        sections.append(Section("Protocols side by side", tuple(grids)))
    sections.append(Section("Published beside measured", (published_grid(spec, rows),)))
    sections.append(Section("Rows against the best", (paired_grid(rows),)))
    if by_condition:
        text = (
            "What a number means: the same rows where every adapter had the same prompt, from a "
            "shared start, on leaf classes never trained on, and with shuffled labels; and plain "
            "inputs as controls."
        )
        grid = controls_grid(spec, rows, by_condition, subset)
        sections.append(Section("Controls", (text, grid)))
    sections.append(Section("Pictures", tuple(figures)))
    if notes := [f"{row.name}: {row.note}." for row in spec.rows if row.note]:
        sections.append(Section("Notes", tuple(notes)))
    return sections


def pictures(
    by_protocol: Mapping[Protocol, Rows], trials: Mapping[str, Trial], folder: Path
) -> list[Figure]:
    """Draw accuracies, learning curves, and confusion and map of the best row.

    Args:
        by_protocol: protocol -> row -> records.
        trials: row -> trial of the first protocol, whose folder holds its curves.
        folder: of the report.
    """
    rows = next(iter(by_protocol.values()))
    best = max(rows, key=lambda name: summarise(rows[name], "accuracy", "val").mean)
    first, n, seeds = rows[best][0], len(rows[best]), seed_counts(rows)
    bars = {
        protocol: {name: summarise(r, "accuracy").percents for name, r in found.items()}
        for protocol, found in by_protocol.items()
    }
    together = np.sum([record.confusion for record in rows[best]], axis=0).tolist()
    plot_confusion(together, first.classes, folder / "confusion.png", seeds=n)
    what = f"{first.dataset}, {first.n_test} test rows, {seeds} seeds"
    of_seeds = f" of all {n} seeds" if n > 1 else ""
    return [
        Figure(
            chart_bars(
                bars,
                folder / "accuracy.png",
                title=f"Test accuracy: {what}",
                chance=100 * majority(first),
            ),
            f"Test accuracy, mean and standard deviation over {seeds} seeds, by protocol.",
        ),
        *_curves({n: t for n, t in trials.items() if rows[n][0].epochs > 1}, rows, folder),
        Figure(
            folder / "confusion.png",
            f"Confusion of {best}, the best by validation accuracy: test rows{of_seeds}.",
        ),
        Figure(
            _map(trials[best].spec, folder / "map.png"),
            f"All adapters by {best}, laid out by t-SNE without looking at labels.",
        ),
    ]


def _curves(trials: Mapping[str, Trial], rows: Rows, folder: Path) -> list[Figure]:
    """Learning curves of what was trained by epochs, where its histories are at hand."""
    curves = {
        name: [line["curves"] for line in journal.read(trial.folder / CURVES)]
        for name, trial in trials.items()
        if (trial.folder / CURVES).is_file()
    }
    if not curves:
        return []
    n = seed_counts({name: rows[name] for name in curves})
    file, title = folder / "curves.png", f"Learning curves: mean and range, {n} seeds"
    text = "Learning curves: mean and range over seeds, as far as half of them still train."
    return [Figure(chart_curves(curves, file, title=title), text)]


def _map(spec: ExperimentSpec, file: Path) -> Path:
    prepared = prepare(spec)
    rows = map_rows(len(prepared.features))
    features = prepared.normalizer(torch.as_tensor(prepared.features[rows])).numpy()
    return draw_map(features, prepared.labels[rows], prepared.task.classes, file)
