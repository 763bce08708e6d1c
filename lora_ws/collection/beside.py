"""Labels from where people keep them: tables and sidecars beside files, and files' own metadata."""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ws.collection.decode import OURS
from lora_ws.errors import DataError, notice, printable, shown

# The column of a table that names the file of each row, as folders of `datasets` have it.
KEY = "file_name"
TABLES = (".csv", ".tsv", ".jsonl")
# Columns that are the label by their name; `category_label` is that of published collections.
LABELS = ("label", "labels", "category_label")
# Values that say that a label applies, or not; a row may say nothing.
FLAGS = (0, 1, None)
# Longer ones are no sidecars. Of lists the first so many are kept, of text so many characters.
MAX_BYTES, MAX_LIST, MAX_TEXT = 1 << 22, 64, 256
# What Python would take for a number, and is a name.
_NAME = re.compile(r"[+-]?0\d|\d+_")
_TRUTHS = {"true", "false", ""}
# What Civitai's record of a version says of its content.
CIVITAI = ("baseModel", "trainedWords", "model.name", "model.nsfw", "model.tags")
Row = dict[str, Any]


@dataclass(frozen=True)
class LabelTables:
    """Tables of labels in the folders of a collection, a row for each file.

    Attributes:
        rows: path below the root, with slashes -> columns.
        files: the tables.
        label: the column that is the label, see `label_of`; or empty.
    """

    rows: Mapping[str, Row] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    label: str = ""


def read_tables(root: Path, files: Sequence[Path], *, named: bool = True) -> LabelTables:
    """Read the CSV and JSON-lines tables that stand beside adapter files.

    A table has a column ``file_name``: paths from its folder, with or without the suffix. A
    table without it, and names without a file, are reported and not used.

    Args:
        root: folder of the collection.
        files: adapters below it.
        named: whether the user named the root, and not folders in it: else a table that stands in
            a folder without adapters, and names none, is nobody's business here.

    Raises:
        DataError: a table is damaged, or two say something of one file.
    """
    known = {file.relative_to(root).as_posix() for file in files}
    rows: dict[str, Row] = {}
    used: list[Path] = []
    beside = {file.parent for file in files}
    for table in _tables(root, files):
        if not named and table.parent not in beside and not _names_any(table, root, known):
            continue
        held = list(read_lines(table))
        if not all(KEY in line for line in held) or not held:
            why = f"a table of labels has a column `{KEY}`" if held else "it holds no rows"
            notice(f"{table}: not used, as {why}")
            continue
        used.append(table)
        names = _names(table, root, held, known)
        if lost := [str(held[k][KEY]) for k, name in enumerate(names) if name not in known]:
            notice(f"{table}: {len(lost)} of its files are not here, such as `{lost[0]}`")
        for name, line in zip(names, held, strict=True):
            if name in rows:
                raise DataError(
                    f"{table}: expected one row for each file, got a second one for `{name}`; "
                    "leave one out"
                )
            rows[name] = _ours({key: value for key, value in line.items() if key != KEY})
    return LabelTables(rows, tuple(used), label_of(rows.values()))


def label_of(rows: Iterable[Row]) -> str:
    """The column that is the label by its name, because there is no other, or all of 0 and 1.

    Args:
        rows: of a table.

    Returns:
        Its name; of several columns of 0 and 1, one label each, their names separated by commas;
        empty where none is the label.

    Example:
        >>> label_of([{"label": "cat", "steps": 9}]), label_of([{"cat": 1, "dog": 0}])
        ('label', 'cat,dog')
    """
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    for name in LABELS:
        if name in columns:
            return name
    flags = all(
        "," not in name
        and all(value in FLAGS for value in held)
        and any(value is not None for value in held)
        for name, held in columns.items()
    )
    return ",".join(columns) if len(columns) == 1 or flags else ""


def sidecars(file: Path) -> Row:
    """Read what stands beside a file under its name: ``<name>.json``, ``<name>.civitai.info``.

    Of the first its numbers, text and lists of text, of the second the content's name, tags and
    words, as ``civitai.model.tags``. One that is no JSON object is reported and left out.

    Args:
        file: an adapter.
    """
    plain = _json_object(file.with_suffix(".json"))
    found = {key: value for key, value in plain.items() if _is_plain(value) and key != "lora_ws"}
    record = _json_object(file.with_suffix(".civitai.info"))
    model = record.get("model")
    whole = {**record, **{f"model.{k}": v for k, v in (_object(model)).items()}}
    kept = {f"civitai.{key}": whole[key] for key in CIVITAI if _is_plain(whole.get(key))}
    return _ours({**found, **kept})


def own_metadata(metadata: Mapping[str, str]) -> Row:
    """Read what a file's header says of its content: ``modelspec.*``, and its training tags.

    Claims of whoever wrote the file. Tags are those of ``ss_tag_frequency``, the most frequent
    first.

    Args:
        metadata: of the header.

    Example:
        >>> own_metadata({"ss_tag_frequency": '{"10_cat": {"fur": 2, "cat": 9}}'})
        {'tags': ['cat', 'fur']}
    """
    found: Row = {
        key: printable(value)[:MAX_TEXT]
        for key, value in metadata.items()
        if key.startswith("modelspec.") and value and "thumbnail" not in key
    }
    counts: dict[str, float] = {}
    for tags in _object(_parsed(metadata.get("ss_tag_frequency", ""))).values():
        for tag, count in _object(tags).items():
            name = printable(tag.strip())[:MAX_TEXT]
            counts[name] = counts.get(name, 0) + (count if isinstance(count, int) else 0)
    if counts:
        found["tags"] = sorted(counts, key=lambda tag: (-counts[tag], tag))[:MAX_LIST]
    return found


def _names(table: Path, root: Path, held: Sequence[Row], known: Set[str]) -> list[str]:
    """The files that rows are of, as paths below the root."""
    above = table.parent.relative_to(root)
    said = [str(line[KEY]).strip() for line in held]
    # Windows writes other strokes between folders.
    names = [(above / name.replace("\\", "/")).as_posix() for name in said]
    return [name if name in known else f"{name}.safetensors" for name in names]


def _names_any(table: Path, root: Path, known: Set[str]) -> bool:
    try:
        held = [line for line in read_lines(table) if KEY in line]
    except DataError:
        return False
    return not known.isdisjoint(_names(table, root, held, known))


def _tables(root: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Tables in the folders of the files and above them, up to the root."""
    folders = {
        folder for file in files for folder in file.parents if root in (folder, *folder.parents)
    }
    for folder in sorted(folders):
        yield from sorted(f for f in folder.iterdir() if f.suffix in TABLES and f.is_file())


def read_lines(table: Path) -> Iterator[Row]:
    """Rows of a table; an empty cell is None, a column of numbers holds numbers.

    Args:
        table: a CSV with a header, or JSON lines.

    Raises:
        DataError: it is neither.
    """
    try:
        text = decoded(table.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{table}: expected text in UTF-8, or in UTF-16 with a byte-order mark ({error}); save "
            "it as UTF-8, or move it"
        ) from error
    if table.suffix != ".jsonl":
        yield from _csv_lines(table, text)
        return
    # Not by `splitlines`: JSON text may hold the other characters that it takes for ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = _parsed(line)
        if not isinstance(found, dict):
            raise DataError(f"{table}, line {number}: expected a JSON object, got `{line[:60]}`")
        yield found


def decoded(data: bytes, errors: str = "strict") -> str:
    """Text by its byte-order mark, as Windows and Excel write one; without, UTF-8.

    Args:
        data: of a file.
        errors: what becomes of other bytes, as for `bytes.decode`.

    Raises:
        ValueError: it is other text, or none.

    Example:
        >>> decoded("é".encode("utf-16")), decoded("é".encode("utf-8-sig"))
        ('é', 'é')
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig", errors)
    if "\0" in text and errors == "strict":
        raise ValueError("it holds zeros, as UTF-16 without a mark does")
    return text


def _csv_lines(table: Path, text: str) -> Iterator[Row]:
    """Rows of a CSV; an empty cell is no label. Columns of numbers, true and false hold these."""
    first = text.partition("\n")[0]
    mark = max(",;\t", key=first.count)
    try:
        cells_of = list(csv.reader(io.StringIO(text, newline=""), delimiter=mark))
    except csv.Error as error:
        raise DataError(f"{table}: expected a CSV with a header ({error})") from error
    head, *lines = cells_of or [[]]
    names = [name.strip() for name in head]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{table}: expected each column once, got {shown(twice[0])} twice")
    held = []
    for number, cells in enumerate(lines, start=2):
        if not any(map(str.strip, cells)):
            continue
        if len(cells) != len(names):
            raise DataError(
                f"{table}, line {number}: expected {len(names)} cells as in the first line; quote "
                "cells that hold commas"
            )
        held.append(dict(zip(names, cells, strict=True)))
    names = [name for name in names if name != KEY]
    numbers = {name for name in names if _are_numbers([row[name] for row in held])}
    truths = {name for name in names if {row[name].strip().lower() for row in held} <= _TRUTHS}
    kinds = {**dict.fromkeys(truths, _truth), **dict.fromkeys(numbers, _number)}
    for row in held:
        cells = {name: cell.strip() for name, cell in row.items()}
        yield {name: kinds.get(name, str)(cell) if cell else None for name, cell in cells.items()}


def _are_numbers(cells: Sequence[str]) -> bool:
    """Whether all that is there are numbers, one of them finite; `007` is a name."""
    if any(_NAME.match(cell.strip()) for cell in cells):
        return False
    try:
        found = [_number(cell) for cell in cells if cell]
    except ValueError:
        return False
    return not found or any(map(math.isfinite, found))


def _number(cell: str) -> float | int:
    return int(cell) if cell.strip().lstrip("+-").isdecimal() else float(cell)


def _truth(cell: str) -> bool:
    return cell.lower() == "true"


def _json_object(file: Path) -> Row:
    if not file.is_file() or file.name == "metadata.json":
        return {}
    found = (
        _parsed(decoded(file.read_bytes(), "replace")) if file.stat().st_size <= MAX_BYTES else None
    )
    if not isinstance(found, dict):
        notice(f"{file}: not used, as it holds no JSON object")
        return {}
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float | bool)


def _ours(row: Row) -> Row:
    """Columns that an import adds keep their names; those of others get another."""
    return {f"original_{key}" if key in OURS else key: value for key, value in row.items()}
