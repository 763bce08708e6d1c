"""The report of an experiment that trains classifiers, and beside it every record behind it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.options import Options
from lora_ws.experiments.trials import Trial
from lora_ws.report.grid import Cell
from lora_ws.report.metrics import measured, metric_of, metrics_of
from lora_ws.report.page import Facts, Section, write_report
from lora_ws.report.records import RunRecord, summarise
from lora_ws.report.tables import majority

RECORDS = "records.jsonl"


def write(
    options: Options,
    spec: EvalSpec,
    sections: Sequence[Section],
    trials: Iterable[Trial],
    compared: Mapping[str, Sequence[RunRecord]],
) -> Path:
    """Write the report and, in one file, every record of its trials.

    Args:
        options: of the command.
        spec: of the experiment.
        sections: after the summary.
        trials: whose records are written.
        compared: name -> records of what the report is about, of which the summary names the best.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: no trial has a record.
    """
    folder, runs = options.folder, options.run_folder()
    lines = [
        {"experiment": trial.folder.relative_to(runs).as_posix(), **record.to_dict()}
        for trial in {trial.folder: trial for trial in trials}.values()
        for record in trial.records()
    ]
    if not lines:
        raise ConfigError(f"{folder}: expected records, found none")
    write_report(folder, f"{options.name}: {spec.title}", [summary(spec, compared), *sections])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / RECORDS).write_text(text, encoding="utf-8")
    return folder


def summary(spec: EvalSpec, compared: Mapping[str, Sequence[RunRecord]]) -> Section:
    """The best by validation rows and what it scores on test rows; where numbers come from."""
    text = (
        f"Published numbers: {spec.source.rstrip('.')}. Measured numbers are of the collection and "
        "protocol that each caption names; docs/protocols.md says what the protocols are. Every "
        f"record behind this page stands in {RECORDS} beside it."
    )
    return Section("Summary", (_best(compared), text))


def _best(compared: Mapping[str, Sequence[RunRecord]]) -> Facts:
    name = metrics_of(compared.values())[0]
    metric, sign = metric_of(name), 1 if metric_of(name).higher_is_better else -1
    best = max(compared, key=lambda one: sign * summarise(compared[one], name, "val").mean)
    records = compared[best]
    unit = " %" if metric.percent else ""
    tiles = {
        "best by validation": best,
        f"its test {metric.name}": f"{metric.text(measured(records, name))}{unit}",
        "largest class": f"{100 * majority(records[0]):.1f} %" if records[0].confusion else "",
        "test rows": f"{records[0].n_test}",
        "seeds": f"{len(records)}",
    }
    return Facts({title: Cell(text) for title, text in tiles.items() if text}, tiles=True)
