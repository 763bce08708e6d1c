"""Reviewed files as lines of JSON and rows of a table, for other programs."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from lora_ws.audit.classify import Finding
from lora_ws.audit.policy import Reviewed
from lora_ws.errors import printable
from lora_ws.journal import replacing

Column = Callable[[Reviewed], object]
Sink = Callable[[Reviewed], object]


@contextmanager
def json_lines(file: Path) -> Iterator[Sink]:
    """Write one JSON object per line: the fields of `Finding`, ``flags``, and ``nearest``."""
    with replacing(file) as partial, partial.open("w", encoding="utf-8") as opened:
        yield lambda one: opened.write(json.dumps(one.to_dict(), allow_nan=False) + "\n")


@contextmanager
def csv_rows(file: Path) -> Iterator[Sink]:
    """Write a table of `COLUMNS`; formulas of spreadsheets are quoted, control codes escaped."""
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as opened:
        opened.write(csv_head())
        yield lambda one: opened.write(csv_line(one))


def csv_head() -> str:
    """The first line of a table."""
    return _line(COLUMNS)


def csv_line(one: Reviewed) -> str:
    """A file's line of a table."""
    return _line(_safe(value(one)) for value in COLUMNS.values())


def others(finding: Finding) -> dict[str, str]:
    """Name what a classifier of several tasks predicts beside its verdict, by column."""
    answers = finding.verdict.answers if finding.verdict else {}
    return {column: answer.label or "abstains" for column, answer in answers.items()}


def _of(part: str, value: Callable[[Any], object]) -> Column:
    """A value of a part of a finding; empty where it has no such part."""

    def read(one: Reviewed) -> object:
        found = getattr(one.finding, part)
        return "" if found is None else value(found)

    return read


def _nearest(value: Callable[[Any], object]) -> Column:
    return lambda one: value(one.nearest[0]) if one.nearest else ""


COLUMNS: dict[str, Column] = {
    "file": attrgetter("finding.file"),
    "sha256": attrgetter("finding.sha256"),
    "update_hash": attrgetter("finding.update_hash"),
    "base": _of("facts", attrgetter("base")),
    "ranks": _of("facts", lambda facts: " ".join(facts.ranks)),
    "norm": _of("facts", attrgetter("norm")),
    "label": _of("verdict", lambda verdict: verdict.label or ""),
    "confidence": _of("verdict", attrgetter("confidence")),
    "abstains": _of("verdict", attrgetter("reason")),
    "no_prediction_reason": attrgetter("finding.no_prediction_reason"),
    "reason": attrgetter("finding.reason"),
    "message": attrgetter("finding.message"),
    "flags": lambda one: "; ".join(one.flags),
    "nearest": _nearest(attrgetter("name")),
    "cosine": _nearest(attrgetter("cosine")),
    # The old name of a column, for one release.
    "silence": attrgetter("finding.no_prediction_reason"),
    # Of a classifier of several tasks, the predictions of those behind the first.
    "answers": lambda one: "; ".join(
        f"{column}: {text}" for column, text in others(one.finding).items()
    ),
}


def _line(values: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue()


def _safe(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = printable(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
