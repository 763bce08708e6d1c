"""What a published collection says of its rows besides weights: in paths, tables, text files."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from lora_ws.collection.beside import read_lines
from lora_ws.collection.card import DatasetCard, SideTable
from lora_ws.errors import DataError

Row = dict[str, Any]
# Values that say that a label applies, or not.
YES, NO = (1, True), (0, -1, False)


@dataclass(frozen=True)
class RowFacts:
    r"""Columns of the rows of published files, by the rules of their card.

    Attributes:
        card: whose ``path_columns``, ``side_tables`` and ``base_from`` are read.
        tables: the content of each side table: value of its key -> row.

    Example:
        >>> card = DatasetCard(name="mine", path_columns=r"r(?P<rank>\d+)/(?P<who>\w+)")
        >>> RowFacts(card).of("r8/ada/a.safetensors")
        {'rank': 8, 'who': 'ada'}
    """

    card: DatasetCard
    tables: Sequence[Mapping[str, Row]] = field(default_factory=tuple)

    def of(self, path: str) -> Row:
        """What is said of a file.

        Args:
            path: in the repository or archive, with slashes.

        Raises:
            DataError: the path is not of the form that the card says.
        """
        row: Row = {}
        if self.card.path_columns:
            found = re.search(self.card.path_columns, path)
            if found is None:
                raise DataError(
                    f"its path is not of the form that card `{self.card.name}` says "
                    f"(path_columns: {self.card.path_columns})"
                )
            row |= {name: number(text) for name, text in found.groupdict().items() if text}
        for rule, table in zip(self.card.side_tables, self.tables, strict=True):
            value = row.get(rule.column, path)
            row |= table.get(str(value), {})
        if self.card.base_from:
            row["base"] = row.get(self.card.base_from)
        return row


def read_facts(card: DatasetCard, fetch: Callable[[SideTable], Sequence[Path]]) -> RowFacts:
    """Read the side tables of a card.

    Args:
        card: of the collection.
        fetch: local copies of the files of a table.

    Raises:
        DataError: a table is damaged, lacks its key, or has a value twice.
    """
    return RowFacts(card, [read_side_table(rule, fetch(rule)) for rule in card.side_tables])


def local_facts(card: DatasetCard, paths: Sequence[Path]) -> RowFacts | None:
    """What a card says of a copy on this machine: tables lie beside the files.

    Raises:
        DataError: a table is not there.
    """
    if not card.path_columns and not card.side_tables:
        return None
    beside = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]

    def find(rule: SideTable) -> list[Path]:
        found = [f for f in beside if any(fnmatch(f.as_posix(), f"*{p}") for p in rule.files)]
        if not found:
            raise DataError(
                f"{paths[0]}: expected the table {', '.join(rule.files)} of `{card.name}` beside "
                "the files, got none; copy it there"
            )
        return sorted(found)

    return read_facts(card, find)


def read_side_table(rule: SideTable, files: Sequence[Path]) -> dict[str, Row]:
    """Rows of a table by their key, with columns of yes and no as one list of labels.

    Args:
        rule: how it is read.
        files: CSV, JSON-lines or parquet.
    """
    rows = [row for file in files for row in _rows(file)]
    if lacking := [row for row in rows for name in rule.key if row.get(name) is None]:
        raise DataError(
            f"{files[0]}: expected a value of {', '.join(rule.key)} in each row, got columns "
            f"{', '.join(map(str, lacking[0]))}"
        )
    flags = _flags(rows, rule) if rule.labels else []
    found: dict[str, Row] = {}
    for row in rows:
        key = "/".join(str(row[name]) for name in rule.key)
        if rule.pattern:
            match = re.search(rule.pattern, key)
            key = "/".join(match.groups()) if match else key
        if key in found:
            raise DataError(f"{files[0]}: expected each key once, got `{key}` twice")
        kept = {name: value for name, value in row.items() if name not in flags}
        if rule.labels:
            kept[rule.labels] = [name for name in flags if row[name] in YES]
        found[key] = kept
    return found


def number(text: str) -> int | float | str:
    """A number where the text is one, written as numbers are; codes such as 007 stay text.

    Example:
        >>> number("12"), number("1e-4"), number("007"), number("ada")
        (12, 0.0001, '007', 'ada')
    """
    if re.fullmatch(r"-?(0|[1-9]\d*)", text):
        return int(text)
    if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?|-?\d*\.\d+(e-?\d+)?", text) and not text.isdecimal():
        return float(text)
    return text


def _flags(rows: Sequence[Row], rule: SideTable) -> list[str]:
    names = [name for name in rows[0] if name not in rule.key] if rows else []
    return [name for name in names if all(row.get(name) in (*YES, *NO) for row in rows)]


def _rows(file: Path) -> list[Row]:
    if PurePosixPath(file).suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    return list(read_lines(file))
