"""Reviewed files as lines of JSON and rows of a table, for other programs."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ws.audit.classify import Finding
from lora_ws.audit.policy import Reviewed
from lora_ws.errors import printable
from lora_ws.journal import replacing

COLUMNS = (
    *("file", "sha256", "update_hash", "base", "ranks", "norm", "label", "confidence", "abstains"),
    *("no_prediction_reason", "reason", "message", "flags", "nearest", "cosine"),
    "silence",  # the old name of a column, for one release
    "answers",  # of a classifier of several tasks, the predictions of those behind the first
)
Sink = Callable[[Reviewed], object]


@contextmanager
def json_lines(file: Path) -> Iterator[Sink]:
    """Write one JSON object per line: the fields of `Finding`, ``flags``, and ``nearest``."""
    with replacing(file) as partial, partial.open("w", encoding="utf-8") as opened:
        yield lambda one: opened.write(json.dumps(one.to_dict(), allow_nan=False) + "\n")


@contextmanager
def csv_rows(file: Path) -> Iterator[Sink]:
    """Write a table with `COLUMNS`; formulas of spreadsheets are quoted, control codes escaped."""
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as opened:
        opened.write(csv_head())
        yield lambda one: opened.write(csv_line(one))


def csv_head() -> str:
    """The first line of a table."""
    return _line(COLUMNS)


def csv_line(one: Reviewed) -> str:
    """A file's line of a table."""
    return _line(_safe(value) for value in _row(one))


def others(finding: Finding) -> dict[str, str]:
    """Name what a classifier of several tasks predicts beside its verdict, by column."""
    answers = finding.verdict.answers if finding.verdict else {}
    return {column: answer.label or "abstains" for column, answer in answers.items()}


def _line(values: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue()


def _row(one: Reviewed) -> tuple[object, ...]:
    finding, facts, verdict = one.finding, one.finding.facts, one.finding.verdict
    near = one.nearest[0] if one.nearest else None
    return (
        *(finding.file, finding.sha256, finding.update_hash),
        facts.base if facts else "",
        " ".join(facts.ranks) if facts else "",
        facts.norm if facts else "",
        *((verdict.label or "", verdict.confidence) if verdict else ("", "")),
        verdict.reason if verdict else "",
        *(finding.no_prediction_reason, finding.reason, finding.message, "; ".join(one.flags)),
        *((near.name, near.cosine) if near else ("", "")),
        finding.no_prediction_reason,
        "; ".join(f"{column}: {text}" for column, text in others(finding).items()),
    )


def _safe(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = printable(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
