"""The section of a figure of principal components."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_ws.experiments.principal_components.spec import PrincipalComponentsSpec
from lora_ws.report.charts import chart_lines
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.metrics import METRICS, measured
from lora_ws.report.page import Figure, Section
from lora_ws.report.records import RunRecord, summarise
from lora_ws.report.tables import majority

Records = Mapping[int, Sequence[RunRecord]]
PARTS = {"test": "test", "validation": "val"}


def components_section(
    spec: PrincipalComponentsSpec, records: Records, missing: Mapping[int, str], folder: Path
) -> Section:
    """Chart and table of accuracy by number of components K.

    Args:
        spec: of the figure.
        records: K -> records, none where K was not measured.
        missing: K -> why it was not.
        folder: of the report; the chart goes there.
    """
    measured = {k: found for k, found in records.items() if found}
    first = next(iter(measured.values()))[0]
    lines = {
        title: {k: summarise(found, "accuracy", part).percents for k, found in measured.items()}
        for title, part in PARTS.items()
    }
    seeds = max(map(len, measured.values()))
    chart = chart_lines(
        lines,
        folder / "components.png",
        title=f"{first.dataset}: {first.n_test} test rows, {seeds} seeds",
        chance=100 * majority(first),
        xlabel="components K",
    )
    caption = "Accuracy over the number of principal components, mean ± standard deviation."
    return Section("Sweep over K", (Figure(chart, caption), _grid(spec, records, missing)))


def _grid(spec: PrincipalComponentsSpec, records: Records, missing: Mapping[int, str]) -> Grid:
    held = next(found for found in records.values() if found)
    columns = [[Cell(str(k)) for k in records]]
    for part in ("val", "test"):
        found = [measured(own, "accuracy", part) for own in records.values()]
        columns.append(METRICS["accuracy"].column(found, [missing[k] for k in records]))
    head = ["K", "Validation", "Test"]
    for dataset, points in spec.published.items():
        values = [points.get(k) for k in records]
        drawn = ["drawn only" if k in points else "none" for k in records]
        texts = [f"{v:.1f}" if v is not None else d for v, d in zip(values, drawn, strict=True)]
        columns.append(ranked(values, texts))
        head.append(f"{dataset}, published")
    first = held[0]
    caption = (
        f"Accuracy in percent, mean ± sample standard deviation over {len(held)} seeds; "
        f"{first.dataset} {first.subset}, {first.n_train} training rows, protocol "
        f"{first.protocol}. Published: {spec.source}"
    )
    return Grid(tuple(head), tuple(zip(*columns, strict=True)), caption)
