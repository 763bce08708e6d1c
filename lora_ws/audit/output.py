"""Reviewed files as lines of JSON and rows of a table, for other programs."""

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from lora_ws.addresses import file_system, is_address
from lora_ws.audit.classify import Finding
from lora_ws.audit.policy import Reviewed
from lora_ws.errors import NotAvailableError, printable
from lora_ws.journal import replacing

Column = Callable[[Reviewed], object]
Sink = Callable[[Reviewed], object]


@contextmanager
def writing(target: str | Path) -> Iterator[Path]:
    """Write a file as a whole: at a path by `replacing`, at an address once it is whole here.

    Args:
        target: path or address.

    Yields:
        Where to write.

    Raises:
        NotAvailableError: the address cannot be written; the file is kept on this machine.

    Example:
        >>> from lora_ws.addresses import file_system
        >>> with writing("memory://folder/a.txt") as file:
        ...     _ = file.write_text("a", encoding="utf-8")
        >>> file_system("memory://folder/a.txt")[0].cat("/folder/a.txt")
        b'a'
    """
    if not is_address(target):
        with replacing(Path(target)) as partial:
            yield partial
        return
    system, path = file_system(str(target))
    folder = Path(tempfile.mkdtemp(prefix="lora_ws-"))
    file = folder / PurePosixPath(path).name
    try:
        yield file
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        system.put_file(str(file), path)
    except Exception as error:
        raise NotAvailableError(
            f"{target}: cannot be written ({type(error).__name__}: {error}); what was to be there "
            f"is {file}"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def json_lines(file: str | Path) -> Iterator[Sink]:
    """Write one JSON object per line: the fields of `Finding`, ``flags``, and ``nearest``."""
    with writing(file) as partial, partial.open("w", encoding="utf-8") as opened:
        yield lambda one: opened.write(json.dumps(one.to_dict(), allow_nan=False) + "\n")


@contextmanager
def csv_rows(file: str | Path) -> Iterator[Sink]:
    """Write a table of `COLUMNS`; formulas of spreadsheets are quoted, control codes escaped."""
    with writing(file) as partial, partial.open("w", newline="", encoding="utf-8") as opened:
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
