"""Tables from records: rows beside published numbers, protocols side by side, controls."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_ws.collection.card import DatasetCard
from lora_ws.experiments.differences import against_published, gap, paired
from lora_ws.experiments.recipes import Protocol
from lora_ws.experiments.table.spec import TableSpec
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.metrics import METRICS, measured, metric_of, metrics_of
from lora_ws.report.records import RunRecord, summarise
from lora_ws.report.tables import majority, results_grid

Records = Sequence[RunRecord]
ACCURACY = METRICS["accuracy"]
NOT_REPEATABLE = "cannot be repeated"


class Condition(NamedTuple):
    """A column of the controls: what is changed of every row's experiment.

    Attributes:
        name: title of the column.
        slug: folder.
        changes: fields of the experiment that differ.
    """

    name: str
    slug: str
    changes: Mapping[str, object]


def conditions(columns: Sequence[str], card: DatasetCard, subset: str) -> list[Condition]:
    """The controls that a collection's columns and subsets allow.

    Args:
        columns: of its table.
        card: names its subsets, and its column of leaf classes.
        subset: the subset of the table itself.
    """
    found = [
        Condition(name, name.replace("/", "-"), {"subset": name})
        for name in card.subsets
        if name != subset
    ]
    # Recorded parts, else parts made of whole leaf classes.
    splits = {"leaf_part": "leaf_part", card.group_columns.get("leaf"): "group:leaf"}
    if split := next((rule for column, rule in splits.items() if column in columns), None):
        found.append(Condition("unseen leaves", "unseen-leaves", {"split": split}))
    found.append(Condition("shuffled labels", "shuffled-labels", {"shuffle_labels": True}))
    return found


def protocol_grid(spec: TableSpec, rows: Mapping[str, Records], protocol: Protocol) -> Grid:
    """All metrics of a protocol; a last column where the collection has published numbers."""
    grid = results_grid(rows)
    first = next(iter(rows.values()))[0]
    head, table = grid.head, grid.rows
    published = {row.name: row.published.get(first.dataset, {}) for row in spec.rows}
    if any(published.values()):
        head = (*head, f"Published for {first.dataset}")
        verdicts = [_published(spec, rows[name], published[name]) for name in rows]
        table = tuple((*cells, verdict) for cells, verdict in zip(table, verdicts, strict=True))
    cost = sum(r.seconds for records in rows.values() for r in records)
    cost += sum(records[0].feature_seconds for records in rows.values())
    caption = f"{grid.caption} Cost: {cost:.0f} s of one core."
    if lost := [row.name for row in spec.rows if row.name not in rows and not row.ours]:
        caption += f" As run, {', '.join(lost)} {NOT_REPEATABLE}."
    shared = sorted({r[0].protocol for r in rows.values()} - {protocol})
    if shared:
        names = [name for name, r in rows.items() if r[0].protocol != protocol]
        caption += (
            f" Where the paper's text and the clean protocol agree the row is the same run: "
            f"{', '.join(names)}."
        )
    return Grid(head, table, caption)


def _published(
    spec: TableSpec, records: Records, published: Mapping[str, tuple[float, float]]
) -> Cell:
    if "accuracy" not in published:
        return Cell("none")
    mean, std = published["accuracy"]
    _, verdict = against_published(summarise(records, "accuracy"), (mean, std), spec.tolerance)
    return Cell(f"{mean:.2f} ± {std:.2f}: {verdict}")


def published_grid(spec: TableSpec, rows: Mapping[str, Records]) -> Grid:
    """Published accuracies and AUROC beside the measured ones, collection by collection."""
    first = next(iter(rows.values()))[0]
    datasets = list(dict.fromkeys(name for row in spec.rows for name in row.published))
    head = ["Representation", f"measured on {first.dataset}"]
    columns = [[Cell(row.name) for row in spec.rows]]
    here = [measured(rows.get(row.name, ()), "accuracy") for row in spec.rows]
    columns.append(ACCURACY.column(here, "not measured"))
    for dataset in datasets:
        means = [row.published.get(dataset, {}).get("accuracy") for row in spec.rows]
        texts = [f"{m[0]:.2f} ± {m[1]:.2f}" if m else "none" for m in means]
        columns.append(ranked([m[0] if m else None for m in means], texts))
        head.append(f"{dataset}, published")
        if dataset != first.dataset:
            head.append(f"{dataset}, measured")
            columns.append([Cell("needs the Hub" if m else "none") for m in means])
    caption = (
        f"Test accuracy in percent. Published: {spec.source}. Only numbers of one collection can "
        "be compared; a column that needs the Hub is filled by `lora-ws reproduce --dataset`."
    )
    return Grid(tuple(head), tuple(zip(*columns, strict=True)), caption)


def versus_grid(
    spec: TableSpec, by_protocol: Mapping[Protocol, Mapping[str, Records]], metric: str
) -> Grid:
    """Protocols side by side, and what each changes against clean, paired by seed."""
    head = ["Representation", *by_protocol]
    names = [row.name for row in spec.rows]
    columns = [[Cell(name) for name in names]]
    clean = by_protocol.get("clean", {})
    for rows in by_protocol.values():
        found = [measured(rows.get(name, ()), metric) for name in names]
        missing = ["not the paper's" if row.ours else NOT_REPEATABLE for row in spec.rows]
        columns.append(metric_of(metric).column(found, missing))
    for protocol, rows in by_protocol.items():
        if protocol == "clean" or not clean:
            continue
        head.append(f"{protocol} − clean")
        both = [n in rows and n in clean for n in names]
        gaps = [
            _gap(rows[n], clean[n], metric) if ok else "" for n, ok in zip(names, both, strict=True)
        ]
        columns.append([Cell(text) for text in gaps])
    caption = (
        f"Test {metric_of(metric).title} in percent, mean ± sample standard deviation over seeds; "
        "differences by seed with a paired t-test. Protocols differ in their test rows too where "
        "their splits differ (docs/protocols.md)."
    )
    return Grid(tuple(head), tuple(zip(*columns, strict=True)), caption)


def _gap(ours: Records, clean: Records, metric: str) -> str:
    same = [record.timeless() for record in ours] == [record.timeless() for record in clean]
    return "the same run" if same else paired(ours, clean, metric).text()


def paired_grid(rows: Mapping[str, Records]) -> Grid:
    """Every row against the best by validation accuracy, paired by seed."""
    best = max(rows, key=lambda name: summarise(rows[name], "accuracy", "val").mean)
    metrics, cells = metrics_of(rows.values()), []
    for name, records in rows.items():
        own = [gap(records, rows[best], metric) for metric in metrics]
        texts = ["the best"] * len(own) if name == best else own
        cells.append((Cell(name), *map(Cell, texts)))
    single = " where both have several" if any(len(r) == 1 for r in rows.values()) else ""
    caption = (
        f"Difference from {best}, the best by validation accuracy, in percent, with p of a paired "
        f"t-test over seeds{single}. Seeds share their test rows, so p is about training anew, "
        "not about other adapters."
    )
    head = ("Representation", *(metric_of(metric).title for metric in metrics))
    return Grid(head, tuple(cells), caption)


def controls_grid(
    spec: TableSpec,
    table: Mapping[str, Records],
    by_condition: Mapping[str, Mapping[str, Records]],
    subset: str,
) -> Grid:
    """Rows and plain inputs (the controls) by condition: prompt corners, unseen leaves, shuffled.

    Args:
        spec: the table.
        table: row -> records under the table's own condition.
        by_condition: condition -> row or plain input -> records; "" is the table's own condition,
            and holds plain inputs alone.
        subset: name of the table's own subset.
    """
    inputs = by_condition.get("", {})
    own = {**table, **inputs}
    columns = {subset or "as above": own} | {c: r for c, r in by_condition.items() if c}
    cells = [[Cell(name if name in table else f"control: {name}") for name in own]]
    for rows in columns.values():
        found = [measured(rows.get(name, ()), "accuracy") for name in own]
        cells.append(ACCURACY.column(found, "not measured"))
    chance = 100 * majority(next(iter(table.values()))[0])
    caption = (
        f"Test accuracy in percent, mean ± sample standard deviation over seeds; guessing the "
        f"largest class scores {chance:.1f} %. {warning(spec, table, inputs)}"
    )
    return Grid(("Input", *columns), tuple(zip(*cells, strict=True)), caption)


def warning(spec: TableSpec, table: Mapping[str, Records], inputs: Mapping[str, Records]) -> str:
    """What to say of controls that come near, or exceed, the best row, ours or the paper's."""
    if not inputs:
        return ""
    theirs = {row.name for row in spec.rows if not row.ours} & set(table)
    groups = {"the best row": table, "the paper's best row": {n: table[n] for n in theirs}}
    found: dict[str, str] = {}
    for title, rows in groups.items():
        best = max(rows, key=lambda name: summarise(rows[name], "accuracy").mean)
        if best not in found:
            found[best] = _near(title, best, rows[best], inputs)
    return " ".join(found.values())


def _near(title: str, best: str, records: Records, inputs: Mapping[str, Records]) -> str:
    top = summarise(records, "accuracy")
    near = [
        f"{name} ({found.percent()})"
        for name, other in inputs.items()
        if (found := summarise(other, "accuracy")).mean >= top.mean - 2 * top.std
    ]
    if not near:
        comes = "reaches" if len(records) == 1 else "comes within two standard deviations of"
        return f"No plain input {comes} {title}, {best}."
    return (
        f"Caution: plain inputs come within two standard deviations of {title}, {best} "
        f"({top.percent()}), or exceed it: {', '.join(near)}."
    )
