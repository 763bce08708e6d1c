"""Tables of results: pure functions of records."""

import re
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from scipy.stats import binomtest

from lora_ws.report.records import METRICS, RunRecord, summarise

TITLES = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
}


def results_rows(groups: Mapping[str, Sequence[RunRecord]]) -> list[list[str]]:
    """Heading and one row an experiment: mean ± std over seeds in percent, best in bold.

    Args:
        groups: experiment -> records of its seeds.
    """
    summaries = {
        name: {metric: summarise(records, metric) for metric in METRICS}
        for name, records in groups.items()
    }
    best = {m: max(summaries, key=lambda name: summaries[name][m].mean) for m in METRICS}
    rows = [["Representation", "Numbers", *TITLES.values(), "p (chance)"]]
    for name, records in groups.items():
        cells = [name, str(records[0].dim)]
        for metric in METRICS:
            text = summaries[name][metric].percent()
            cells.append(f"**{text}**" if best[metric] == name else text)
        rows.append([*cells, f"{p_chance(records):.0e}"])
    return rows


def results_markdown(groups: Mapping[str, Sequence[RunRecord]]) -> str:
    """The table of results and what it rests on, as Markdown."""
    rows = results_rows(groups)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "--:|" * (len(rows[0]) - 1))
    return "\n".join([*lines, "", caption(groups)])


def results_terminal(groups: Mapping[str, Sequence[RunRecord]]) -> Table:
    """The same table for a terminal."""
    head, *rows = results_rows(groups)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for k, title in enumerate(head):
        table.add_column(title, no_wrap=True, justify="right" if k else "left")
    for row in rows:
        table.add_row(*[re.sub(r"^\*\*(.*)\*\*$", r"[bold]\1[/bold]", cell) for cell in row])
    return table


def caption(groups: Mapping[str, Sequence[RunRecord]]) -> str:
    """What a table rests on: data, sizes, seeds, protocol, engine, chance level."""
    counts = sorted({len(records) for records in groups.values()})
    seeds = " to ".join(str(count) for count in {counts[0]: 0, counts[-1]: 0})
    first = next(iter(groups.values()))[0]
    subset = f", subset {first.subset}" if first.subset else ""
    split = f", split by {first.split}" if first.split else ""
    return (
        f"{first.dataset}{subset}; {first.n_train}/{first.n_val}/{first.n_test} rows to train, "
        f"validate and test{split}; seeds: {seeds}; mean ± sample standard "
        f"deviation in percent; protocol {first.protocol}; engine {first.engine}. Always naming "
        f"the largest class scores {100 * majority(first):.1f} % accuracy; p is the chance of the "
        "mean test accuracy under that guess (one-sided binomial test)."
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
