"""The sections of a comparison of readers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_ws.experiments.differences import gap
from lora_ws.experiments.quoted import published_section
from lora_ws.experiments.readers.spec import ReadersSpec
from lora_ws.report.charts import chart_dots
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.metrics import METRICS, MISSING, measured
from lora_ws.report.page import Figure, Section
from lora_ws.report.records import RunRecord, Summary, summarise
from lora_ws.report.tables import majority, refit_note

Row = Mapping[str, Sequence[RunRecord]]
ACCURACY = METRICS["accuracy"]


class Cost(NamedTuple):
    """What a reader costs; NaN where no bundle can hold it.

    Attributes:
        numbers: that a bundle keeps of network and representation.
        seconds: to train one seed, features included.
        milliseconds: of CPU time for the verdict on an adapter that is in memory.
    """

    numbers: float
    seconds: float
    milliseconds: float


class DrawOutcome(NamedTuple):
    """What the draws of one network gave in one column.

    Attributes:
        reader: title of the row.
        column: title of the column.
        lr: learning rate of the draw that validation chose.
        weight_decay: of the same.
        tried: the record of each draw, one seed.
        chosen: records of the chosen draw, every seed.
    """

    reader: str
    column: str
    lr: float
    weight_decay: float
    tried: Sequence[RunRecord]
    chosen: Sequence[RunRecord]


def readers_sections(
    spec: ReadersSpec, records: Mapping[str, Row], costs: Mapping[str, Cost], folder: Path
) -> list[Section]:
    """Everything that the report says.

    Args:
        spec: the comparison.
        records: reader -> column -> records of its seeds.
        costs: of each reader.
        folder: of the report, where images go.
    """
    figure = Figure(
        _chart(spec, records, folder),
        "Test accuracy: mean and sample standard deviation over seeds.",
    )
    sections = [
        Section("Readers", (figure, accuracy_grid(spec, records))),
        Section("Against the best", (versus_grid(spec, records),)),
        Section("What each costs", (cost_grid(spec, costs),)),
    ]
    if spec.published:
        quoted = (
            "As printed by the readers' authors, on collections of their own: no number here can "
            "be compared with one above."
        )
        sections.append(published_section(quoted, spec.published))
    return sections


def accuracy_grid(spec: ReadersSpec, records: Mapping[str, Row]) -> Grid:
    """A row per reader: test accuracy by column."""
    columns = [column.name for column in spec.columns]
    names = list(records)
    cells = [[Cell(name) for name in names]]
    for column in columns:
        cells.append(ACCURACY.column([measured(records[n][column], "accuracy") for n in names]))
    table = [tuple(row) for row in zip(*cells, strict=True)]
    for name, values in spec.measured_elsewhere.items():
        table.append((Cell(name), *[Cell(f"{value:.1f}") for value in values]))
    return Grid(("Reader", *columns), tuple(table), _caption(spec, records))


def cost_grid(spec: ReadersSpec, costs: Mapping[str, Cost]) -> Grid:
    """A row per reader: what it is, and what it costs."""
    rows = [
        (
            reader.name,
            group,
            reader.source,
            _number(costs[reader.name].numbers),
            f"{costs[reader.name].seconds:.1f}",
            _decimal(costs[reader.name].milliseconds),
        )
        for group, readers in spec.groups.items()
        for reader in readers
        if reader.name in costs
    ]
    caption = (
        "Numbers: all that a bundle keeps of network and representation. Seconds to train a seed, "
        "features included. Milliseconds: CPU time of one verdict, the file read already. Times "
        "are of this machine, one thread per process."
    )
    head = ("Reader", "Group", "Source", "Numbers", "s to train", "ms to read")
    return Grid(head, tuple(tuple(map(Cell, row)) for row in rows), caption, left=3)


def draws_grid(outcomes: Sequence[DrawOutcome]) -> Grid:
    """What each network gains by another learning rate and weight decay."""
    rows = []
    for one in outcomes:
        accuracies = [100 * record.test["accuracy"] for record in one.tried]
        rows.append(
            (
                Cell(one.reader),
                Cell(one.column),
                Cell(f"{min(accuracies):.0f} to {max(accuracies):.0f}"),
                Cell(ACCURACY.text(measured(one.chosen, "accuracy"))),
                Cell(f"{one.lr:g}"),
                Cell(f"{one.weight_decay:g}"),
            )
        )
    caption = (
        f"{len(outcomes[0].tried)} draws of learning rate and weight decay, the same for every "
        "network, with one seed each; the one with the highest validation AUROC is chosen and "
        "trained with every seed. Test accuracy in percent: smallest and largest of all draws, "
        "and of the chosen one."
    )
    head = ("Reader", "Column", "All draws", "Chosen", "Learning rate", "Weight decay")
    return Grid(head, tuple(rows), caption, left=2)


def versus_grid(spec: ReadersSpec, records: Mapping[str, Row]) -> Grid:
    """Every reader against the best of each column, which the validation rows name."""
    names, cells = list(records), [[Cell(name) for name in records]]
    for column in spec.columns:
        found = {name: records[name][column.name] for name in names}
        best = max(names, key=lambda n: summarise(found[n], "accuracy", "val").mean)
        top = found[best]
        gaps = ["the best" if n == best else gap(found[n], top) for n in names]
        cells.append([Cell(text) for text in gaps])
    head = ("Reader", *(column.name for column in spec.columns))
    caption = (
        "Test accuracy minus that of the reader with the highest mean validation accuracy in the "
        "column, in percent; p of a paired t-test over seeds where both have several. Seeds share "
        "their test rows, so p is about training anew, not about other adapters."
    )
    return Grid(head, tuple(zip(*cells, strict=True)), caption)


def _caption(spec: ReadersSpec, records: Mapping[str, Row]) -> str:
    firsts = [rows[0] for row in records.values() for rows in row.values()]
    sizes = sorted({(r.n_train, r.n_val, r.n_test) for r in firsts})
    seeds = sorted({len(rows) for row in records.values() for rows in row.values()})
    chance = sorted({round(100 * majority(r), 1) for r in firsts})
    text = (
        f"Test accuracy in percent on {firsts[0].dataset}, mean ± sample standard deviation over "
        f"seeds ({' or '.join(map(str, seeds))}; one where nothing is drawn); rows to train, "
        f"validate and test: {'; '.join('/'.join(map(str, size)) for size in sizes)}."
        f"{refit_note({name: next(iter(row.values())) for name, row in records.items()})} Always "
        f"predicting the largest class: {' to '.join(map(str, chance))} %. Best and second best of "
        "a column are marked, controls among them."
    )
    return f"{text} {spec.note}" if spec.measured_elsewhere else text


def _chart(spec: ReadersSpec, records: Mapping[str, Row], folder: Path) -> Path:
    series = {
        column.name: {
            name: summarise(row[column.name], "accuracy").percents for name, row in records.items()
        }
        for column in spec.columns
    }
    for k, column in enumerate(spec.columns):
        for name, values in spec.measured_elsewhere.items():
            series[column.name][name] = Summary.of([values[k] / 100]).percents
    chance = 100 * majority(next(iter(next(iter(records.values())).values()))[0])
    firsts = [rows for row in records.values() for rows in row.values()]
    most, rows = max(map(len, firsts)), firsts[0][0].n_test
    return chart_dots(
        series,
        folder / "readers.png",
        title=f"Test accuracy of readers: {rows} rows, up to {most} seeds",
        chance=chance,
        xlabel="test accuracy, percent",
    )


def _number(value: float) -> str:
    if math.isnan(value):
        return MISSING
    return f"{value / 1e6:.2f} M" if value >= 1e4 else f"{value:.0f}"


def _decimal(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.1f}"
