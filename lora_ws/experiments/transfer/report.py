"""The sections of a report on transfer: what each reader loses, a heat map of each factor, zoos."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_ws.experiments.differences import interval
from lora_ws.experiments.transfer.matrix import Matrix, matrices
from lora_ws.experiments.transfer.spec import RECIPE, TransferRecord, TransferSpec, ZooRecord
from lora_ws.report.charts import chart_tables
from lora_ws.report.grid import Cell, Grid
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
    sets = len(next(iter(next(iter(found.values())).hits.values())))
    folds = [one for one in records if one.reader == records[0].reader]
    sizes = sorted({(one.n_train, one.n_val) for one in folds})
    shown = " or ".join(f"{train} + {val}" for train, val in (sizes[0], sizes[-1]))
    text = (
        f"Readers are trained on adapters of one recipe and tested on adapters of another. Every "
        f"zoo has the same {sets} photo sets, which share no photo, so a reader never saw the "
        f"photos that it is tested on, in no zoo. {spec.folds} folds: each photo set is tested on "
        f"once, by a reader trained on {shown} adapters (training + validation; fewest and most of "
        "a fold), also where several zoos are mixed: there each photo set is of one of them. "
        "Intervals of 95 % are of a bootstrap over photo sets, paired: both sides of a difference "
        "read the same photo sets."
    )
    kept = (
        "Chance is 10 %. A reader that hardly reads at home has little to lose: compare both "
        "tables. Readers of raw weights read no rank but the one they were trained on (–)."
    )
    sections = [
        Section("What each reader loses on another recipe", (text, losses_grid(spec, found), kept))
    ]
    for factor in spec.factors:
        sections.append(_factor_section(spec, factor, found, sets, folder))
    return [*sections, Section("Zoos", (zoos_grid(spec, zoos),))]


def losses_grid(spec: TransferSpec, found: Matrices) -> Grid:
    """A row per reader, a column per factor: what is lost on other values, with its interval."""
    rows = []
    for reader in dict.fromkeys(reader for reader, _ in found):
        own = [found[reader, factor] for factor in spec.factors]
        home = own[0].share((RECIPE,), RECIPE)
        rows.append((Cell(reader), Cell(_number(home)), *[Cell(_gap(one.gaps)) for one in own]))
    caption = (
        "At home: accuracy in percent, trained and tested on the recipe itself. Then for each "
        "factor: accuracy on another value less that of the reader trained on that value, in "
        "points, the mean over all pairs of values (95 %)."
    )
    return Grid(("Reader", "at home", *spec.factors), tuple(rows), caption)


def factor_grid(spec: TransferSpec, factor: str, found: Matrices) -> Grid:
    """A row per reader: at home, on another value, the worst pair, mixtures."""
    names = {one.zoo: name for name, one in spec.factors[factor].items()}
    rows = []
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
        cells += [_gap(matrix.mixed), _gap(matrix.left_out)]
        rows.append(tuple(map(Cell, cells)))
    head = ("Reader", "same value, %", "another value", "worst", MIXED, OTHERS)
    caption = (
        "Same value: mean accuracy, trained and tested on it. The others: differences to it in "
        "points (95 %), on the same test adapters. Worst: trained on → tested on, and of what the "
        f"reader trained on that value reads. {MIXED}: trained on all values, as many adapters as "
        f"of one; {OTHERS}: on all values but the one tested on."
    )
    return Grid(head, tuple(rows), caption)


def zoos_grid(spec: TransferSpec, zoos: Sequence[ZooRecord]) -> Grid:
    """A row per zoo: what it is, and what training made of it."""
    values = spec.values
    rows = []
    for one in zoos:
        changes = ", ".join(f"{key} {value}" for key, value in values[one.zoo].changes.items())
        if cast := values[one.zoo].cast:
            changes = f"the recipe's adapters rounded to {cast}"
        cells = [one.zoo, changes or "none", f"{one.adapters}", f"{one.rank}", f"{one.loss:.3f}"]
        cells += [f"{one.norm_b:.3f}", MISSING if cast else f"{one.seconds:.2f}"]
        rows.append(tuple(map(Cell, cells)))
    head = ("Zoo", "changes", "adapters", "rank", "loss", "norm of B", "s per adapter")
    caption = (
        f"Changes to training/{spec.zoo}.yaml. Loss of the last epoch and Frobenius norm of all B, "
        "means over adapters. Seconds of one thread, beside other work."
    )
    return Grid(head, tuple(rows), caption, left=2)


def _factor_section(
    spec: TransferSpec, factor: str, found: Matrices, sets: int, folder: Path
) -> Section:
    names, zoos = list(spec.factors[factor]), spec.zoos(factor)
    own = {reader: matrix for (reader, one), matrix in found.items() if one == factor}
    rows = [*names, MIXED, *([OTHERS] if len(names) > 2 else [])]
    tables = {reader: _table(matrix, zoos) for reader, matrix in own.items()}
    file = chart_tables(
        tables,
        rows,
        names,
        folder / f"{factor.replace(' ', '_')}.png",
        title=f"{factor}: accuracy in percent, {sets} photo sets",
        ylabel="trained on",
        xlabel="tested on",
    )
    at_half = 100 * 1.96 * np.sqrt(0.25 / sets)
    caption = (
        f"Accuracy in percent, trained on the row's value of {factor} and tested on the column's; "
        f"{sets} test adapters a cell, so that a share near one half is known to ± {at_half:.0f}."
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


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
