"""The sections of a report on transfer: what each reader loses, a heat map of each factor, zoos."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_ws.experiments.differences import interval
from lora_ws.experiments.transfer.matrix import Matrix, matrices
from lora_ws.experiments.transfer.spec import TransferRecord, TransferSpec, ZooRecord
from lora_ws.report.charts import chart_tables
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.metrics import MISSING
from lora_ws.report.page import Figure, Section

MIXED, OTHERS = "all, mixed", "all others"
Matrices = Mapping[tuple[str, str], Matrix]


def transfer_sections(
    spec: TransferSpec,
    records: Sequence[TransferRecord],
    zoos: Sequence[ZooRecord],
    folder: Path,
) -> list[Section]:
    """Everything that the report says.

    Args:
        spec: the study.
        records: of every reader, training and fold.
        zoos: what was read.
        folder: of the report, where images go.
    """
    found = matrices(spec, records)
    text = (
        "Readers are trained on adapters of one recipe and tested on adapters of another. Within a "
        "factor all values have the same photo sets, and no reader saw the photos that it is "
        "tested on, in no zoo. Mixtures have as many adapters as one value: each photo set is of "
        "one of them. Intervals of 95 % are of a bootstrap over photo sets, paired: both sides of "
        "a difference read the same photo sets."
    )
    kept = (
        "A reader that at home hardly does better than guessing has little to lose: compare "
        "both tables. A reader of raw weights reads no rank but the one it was trained on: a dash."
    )
    sections = [
        Section(
            "Which reader survives",
            (text, home_grid(spec, found), losses_grid(spec, found), kept),
        )
    ]
    for factor in spec.factors:
        sections.append(_factor_section(spec, factor, found, records, folder))
    return [*sections, Section("Zoos", (zoos_grid(spec, zoos),))]


def home_grid(spec: TransferSpec, found: Matrices) -> Grid:
    """A row per reader, a column per factor: accuracy where nothing changes."""
    readers = list(dict.fromkeys(reader for reader, _ in found))
    cells = [[Cell(name) for name in readers]]
    for factor in spec.factors:
        values = [found[reader, factor].home for reader in readers]
        cells.append(ranked(values, [f"{value:.1f}" for value in values]))
    caption = (
        "At home: accuracy in percent, trained and tested on the same value of a factor, the mean "
        "over its values."
    )
    return Grid(("Reader", *spec.factors), tuple(zip(*cells, strict=True)), caption)


def losses_grid(spec: TransferSpec, found: Matrices) -> Grid:
    """A row per reader, a column per factor: what is lost on other values, with its interval."""
    rows = []
    for reader in dict.fromkeys(reader for reader, _ in found):
        own = [_gap(found[reader, factor].gaps) for factor in spec.factors]
        rows.append(tuple(map(Cell, (reader, *own))))
    caption = (
        "Away: accuracy on another value less that of the reader trained on that value, in "
        "points, the mean over all pairs of values (95 %)."
    )
    return Grid(("Reader", *spec.factors), tuple(rows), caption)


def factor_grid(spec: TransferSpec, factor: str, found: Matrices) -> Grid:
    """A row per reader: at home, on another value, the worst pair, mixtures."""
    names = {one.zoo: name for name, one in spec.factors[factor].items()}
    # Of two values, all others is the other.
    rows, several = [], len(names) > 2
    for (reader, own), matrix in found.items():
        if own != factor:
            continue
        worst = matrix.worst
        said = MISSING
        if worst:
            trained, tested = worst
            there, home = matrix.share((trained,), tested), matrix.share((tested,), tested)
            said = f"{names[trained]} → {names[tested]}: {there:.1f} of {home:.1f}"
        cells = [reader, f"{matrix.home:.1f}", _gap(matrix.gaps), said]
        cells += [_gap(matrix.mixed), *([_gap(matrix.left_out)] if several else [])]
        rows.append(tuple(map(Cell, cells)))
    head = ("Reader", "same value, %", "another value", "worst", MIXED, *([OTHERS] * several))
    caption = (
        "Same value: mean accuracy, trained and tested on it. The others: differences to it in "
        "points (95 %), on the same test adapters. Worst: trained on → tested on, and of what the "
        f"reader trained on that value reads. {MIXED}: trained on all values, as many adapters as "
        "of one."
    )
    if several:
        caption += f" {OTHERS}: on all values but the one tested on, as many."
    return Grid(head, tuple(rows), caption)


def zoos_grid(spec: TransferSpec, zoos: Sequence[ZooRecord]) -> Grid:
    """A row per zoo: what it is, and what training made of it."""
    values = spec.values
    rows = []
    for one in zoos:
        value = values[one.zoo]
        said = ", ".join(f"{key} {new}" for key, new in value.changes.items())
        if value.cast:
            said = f"its adapters, rounded to {value.cast}"
        if value.dataset:
            said = "a collection"
        cells = [one.zoo, said or "none", f"{one.adapters}", f"{one.rank}", f"{one.loss:.3f}"]
        made = value.cast or value.dataset
        cells += [f"{one.norm_b:.3f}", MISSING if made else f"{one.seconds:.2f}"]
        rows.append(tuple(map(Cell, cells)))
    head = (
        "Zoo",
        "changes to the recipe",
        "adapters",
        "rank",
        "loss",
        "norm of B",
        "s per adapter",
    )
    caption = (
        f"The recipe: {spec.zoo} in training/. Loss of the last epoch and Frobenius norm of all B: "
        "means over adapters. Seconds: of one thread, beside other work."
    )
    return Grid(head, tuple(rows), caption, left=2)


def _factor_section(
    spec: TransferSpec,
    factor: str,
    found: Matrices,
    records: Sequence[TransferRecord],
    folder: Path,
) -> Section:
    names, zoos = list(spec.factors[factor]), spec.zoos(factor)
    own = {reader: matrix for (reader, one), matrix in found.items() if one == factor}
    tested = len(next(iter(next(iter(own.values())).hits.values())))
    rows = [*names, MIXED, *([OTHERS] if len(names) > 2 else [])]
    file = chart_tables(
        {reader: _table(matrix, zoos) for reader, matrix in own.items()},
        rows,
        names,
        folder / f"{factor.replace(' ', '_')}.png",
        title=f"{factor}: accuracy in percent, {tested} test adapters a cell",
        ylabel="trained on",
        xlabel="tested on",
    )
    sizes = sorted({(one.n_train, one.n_val) for one in records if one.trained[0] in zoos})
    trained = " or ".join(f"{train} + {val}" for train, val in dict.fromkeys((sizes[0], sizes[-1])))
    folds = spec.splits(zoos[0])
    how = f"{folds} folds" if folds > 1 else "the collection's own parts"
    caption = (
        f"Accuracy in percent, trained on the row's value of {factor} and tested on the column's; "
        f"{how}: {trained} adapters to train and validate, {tested} test adapters a cell, so that "
        f"a share near one half is known to ± {100 * 1.96 * np.sqrt(0.25 / tested):.0f}."
    )
    alt = f"A heat map for each reader, by {factor} trained on and tested on."
    return Section(factor, (Figure(file, caption, alt), factor_grid(spec, factor, found)))


def _table(matrix: Matrix, zoos: Sequence[str]) -> list[list[float | None]]:
    rows = [[matrix.share((trained,), tested) for tested in zoos] for trained in zoos]
    rows.append([matrix.share(tuple(zoos), tested) for tested in zoos])
    if len(zoos) > 2:
        rows.append([matrix.share(matrix.others(tested), tested) for tested in zoos])
    return rows


def _gap(gaps: np.ndarray | None) -> str:
    if gaps is None:
        return MISSING
    low, high = interval(gaps)
    return f"{100 * gaps.mean():+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
