"""Tables of results: pure functions of records."""

from collections.abc import Mapping, Sequence

from scipy.stats import binomtest

from lora_ws.report.grid import Cell, Grid
from lora_ws.report.metrics import MISSING, measured, metric_of, metrics_of
from lora_ws.report.records import RunRecord

Groups = Mapping[str, Sequence[RunRecord]]


def headline(records: Sequence[RunRecord]) -> str:
    """Format the first metric of an experiment for one line of text."""
    name = metrics_of([records])[0]
    metric = metric_of(name)
    unit = " %" if metric.percent else ""
    return f"test {metric.name} {metric.text(measured(records, name))}{unit}"


def results_grid(groups: Groups, references: Mapping[str, float] | None = None) -> Grid:
    """One row per experiment: every metric as mean ± std over seeds, best in bold.

    Args:
        groups: experiment -> records of its seeds.
        references: accuracy of what the experiments are held against, as shares: rows below.
    """
    head = ["Representation", "Numbers"]
    columns = [[Cell(name) for name in groups]]
    columns += [[Cell(_numbers(records)) for records in groups.values()]]
    for name in metrics_of(groups.values()):
        metric = metric_of(name)
        head.append(metric.title)
        columns.append(metric.column([measured(records, name) for records in groups.values()]))
    if _names_classes(groups):
        head.append("p (chance)")
        columns.append([Cell(_chance(records)) for records in groups.values()])
    rows = list(zip(*columns, strict=True))
    accuracy = metric_of("accuracy").title
    for name, value in (references or {}).items() if accuracy in head else ():
        known = {head[0]: name, accuracy: f"{100 * value:.1f}"}
        rows.append(tuple(Cell(known.get(title, MISSING)) for title in head))
    return Grid(tuple(head), tuple(rows), caption(groups))


def _numbers(records: Sequence[RunRecord]) -> str:
    """How many numbers a representation has; seeds that choose what to read may differ."""
    found = sorted({record.dim for record in records})
    return " to ".join(str(dim) for dim in dict.fromkeys((found[0], found[-1])))


def caption(groups: Groups) -> str:
    """Caption of a table: data, sizes, seeds, protocol, engine, chance level."""
    first, names = _first(groups), metrics_of(groups.values())
    percent = all(metric_of(name).percent for name in names)
    text = _basis(groups, " in percent" if percent else "")
    if _names_classes(groups):
        text += (
            f" Always predicting the largest class scores {100 * majority(first):.1f} % accuracy; "
            "p is the chance of the mean test accuracy under that guess (one-sided binomial test)."
        )
    if "r2" in names:
        text += " Always predicting the mean of the training rows has an R² of about 0."
    return text


def seed_counts(groups: Groups) -> str:
    """How many seeds experiments have, such as ``10`` or ``1 to 10``."""
    counts = sorted({len(records) for records in groups.values()})
    return " to ".join(str(count) for count in {counts[0]: 0, counts[-1]: 0})


def _basis(groups: Groups, unit: str) -> str:
    first, seeds = _first(groups), seed_counts(groups)
    engines = ", ".join(dict.fromkeys(records[0].engine for records in groups.values()))
    subset = f", subset {first.subset}" if first.subset else ""
    split = f", split by {first.split}" if first.split else ""
    return (
        f"{first.dataset}{subset}; {first.n_train}/{first.n_val}/{first.n_test} rows to train, "
        f"validate and test{split}; seeds: {seeds}; mean ± sample standard deviation{unit}; "
        f"protocol {first.protocol}; engine {engines}.{refit_note(groups)}"
    )


def refit_note(groups: Groups) -> str:
    """Sentence on experiments that train on validation rows too; empty where none does."""
    names = [name for name, records in groups.items() if records[0].refit]
    return f" Fitted again on validation rows too: {'; '.join(names)}." if names else ""


def majority(record: RunRecord) -> float:
    """Share of the largest class among the test rows."""
    return max(sum(row) for row in record.confusion) / record.n_test


def p_chance(records: Sequence[RunRecord]) -> float | None:
    """Probability of at least the mean number of hits when guessing the largest class.

    The seeds share their test rows, so they count as one test, not as many. None where a record
    holds no accuracy.
    """
    first, accuracy = records[0], measured(records, "accuracy")
    if accuracy is None:
        return None
    hits = int(accuracy.mean * first.n_test + 1e-6)
    return float(binomtest(hits, first.n_test, majority(first), alternative="greater").pvalue)


def _chance(records: Sequence[RunRecord]) -> str:
    p = p_chance(records)
    return MISSING if p is None else f"{p:.0e}"


def _names_classes(groups: Groups) -> bool:
    """Whether accuracy can be held against predicting the largest class."""
    first = _first(groups)
    return bool(first.confusion) and "accuracy" in first.test


def _first(groups: Groups) -> RunRecord:
    return next(iter(groups.values()))[0]
