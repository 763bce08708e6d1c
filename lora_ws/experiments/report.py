"""The report of an experiment that trains classifiers, and beside it every record behind it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.options import Options
from lora_ws.experiments.trials import Trial
from lora_ws.report.page import Section, write_report

RECORDS = "records.jsonl"


def write(
    options: Options, spec: EvalSpec, sections: Sequence[Section], trials: Iterable[Trial]
) -> Path:
    """Write the report and, in one file, every record of its trials.

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
    write_report(folder, f"{options.name}: {spec.title}", [introduction(spec), *sections])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / RECORDS).write_text(text, encoding="utf-8")
    return folder


def introduction(spec: EvalSpec) -> Section:
    """Where the numbers of a report come from."""
    text = (
        f"Published numbers: {spec.source.rstrip('.')}. Measured numbers are of the collection and "
        "protocol that each caption names; docs/protocols.md says what the protocols are. Every "
        f"record behind this page stands in {RECORDS} beside it."
    )
    return Section("What this is", (text,))
