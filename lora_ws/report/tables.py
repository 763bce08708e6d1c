"""Tables of results: pure functions of records."""

from collections.abc import Mapping, Sequence

from scipy.stats import binomtest

from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.records import METRICS, NUMBER_METRICS, RunRecord, summarise

TITLES = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
}
NUMBER_TITLES = {"r2": "R²", "mae": "Mean absolute error", "spearman": "Spearman"}


def headline(records: Sequence[RunRecord]) -> str:
    """The metric that a line about an experiment names."""
    if records[0].classes:
        return f"test accuracy {summarise(records, 'accuracy').percent()} %"
    return f"test R² {summarise(records, 'r2').plain()}"


def results_grid(groups: Mapping[str, Sequence[RunRecord]]) -> Grid:
    """One row an experiment: mean ± std over seeds in percent, best in bold, second underlined.

    Args:
        groups: experiment -> records of its seeds.
    """
    columns = [[Cell(name) for name in groups]]
    columns += [[Cell(str(records[0].dim)) for records in groups.values()]]
    if not next(iter(groups.values()))[0].classes:
        return _numbers_grid(groups, columns)
    for metric in METRICS:
        summaries = [summarise(records, metric) for records in groups.values()]
        columns.append(ranked([s.mean for s in summaries], [s.percent() for s in summaries]))
    columns += [[Cell(f"{p_chance(records):.0e}") for records in groups.values()]]
    head = ("Representation", "Numbers", *TITLES.values(), "p (chance)")
    return Grid(head, tuple(zip(*columns, strict=True)), caption(groups))


def _numbers_grid(groups: Mapping[str, Sequence[RunRecord]], columns: list[list[Cell]]) -> Grid:
    """The same of regressions."""
    for metric in NUMBER_METRICS:
        found = [summarise(records, metric) for records in groups.values()]
        better = [-s.mean if metric == "mae" else s.mean for s in found]
        columns.append(ranked(better, [s.plain() for s in found]))
    head = ("Representation", "Numbers", *NUMBER_TITLES.values())
    basis = f"{_basis(groups)} Always naming the mean of the training rows has an R² of about 0."
    return Grid(head, tuple(zip(*columns, strict=True)), basis)


def caption(groups: Mapping[str, Sequence[RunRecord]]) -> str:
    """What a table rests on: data, sizes, seeds, protocol, engine, chance level."""
    first = next(iter(groups.values()))[0]
    return (
        f"{_basis(groups, ' in percent')} Always naming the largest class scores "
        f"{100 * majority(first):.1f} % accuracy; p is the chance of the mean test accuracy under "
        "that guess (one-sided binomial test)."
    )


def _basis(groups: Mapping[str, Sequence[RunRecord]], unit: str = "") -> str:
    counts = sorted({len(records) for records in groups.values()})
    seeds = " to ".join(str(count) for count in {counts[0]: 0, counts[-1]: 0})
    first = next(iter(groups.values()))[0]
    subset = f", subset {first.subset}" if first.subset else ""
    split = f", split by {first.split}" if first.split else ""
    return (
        f"{first.dataset}{subset}; {first.n_train}/{first.n_val}/{first.n_test} rows to train, "
        f"validate and test{split}; seeds: {seeds}; mean ± sample standard deviation{unit}; "
        f"protocol {first.protocol}; engine {first.engine}."
    )


def majority(record: RunRecord) -> float:
    """Share of the largest class among the test rows."""
    return max(sum(row) for row in record.confusion) / record.n_test


def p_chance(records: Sequence[RunRecord]) -> float:
    """Probability of at least the mean number of hits when guessing the largest class.

    The seeds share their test rows, so they count as one test, not as many.
    """
    first = records[0]
    hits = int(summarise(records, "accuracy").mean * first.n_test + 1e-6)
    return float(binomtest(hits, first.n_test, majority(first), alternative="greater").pvalue)
