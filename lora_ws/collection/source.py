"""What an importer is: rows in batches, in a fixed order, every value checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from lora_ws.adapters.layout import Layout
from lora_ws.errors import AdapterError, DataError, LayoutError

BATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Problem:
    """Why something was not imported: which file, which row, which column, and the reason."""

    source: str
    reason: str
    row: int | None = None
    column: str | None = None
    rows_lost: int = 1

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        column = "" if self.column is None else f", column `{self.column}`"
        return f"{self.source}{row}{column}: {self.reason}"


@dataclass
class Batch:
    """Rows that fit, and problems with those that do not."""

    weights: np.ndarray
    rows: pa.Table
    problems: list[Problem] = field(default_factory=list)


class ImportSource(Protocol):
    """Something rows can be imported from."""

    def identity(self) -> Mapping[str, Any]:
        """What it is; an interrupted import continues only from an equal source."""
        ...

    def count(self) -> int:
        """How many rows it holds, good and bad."""
        ...

    def find_layout(self) -> Layout:
        """The layout of its first usable row."""
        ...

    def batches(self, layout: Layout, skip: int) -> Iterator[Batch]:
        """All batches but the first ``skip``."""
        ...


def read_batches(
    names: Sequence[str],
    read: Callable[[str], tuple[np.ndarray, dict[str, Any]]],
    layout: Layout,
    skip: int,
) -> Iterator[Batch]:
    """Read files, one row each, some at a time.

    Args:
        names: of the files, in order.
        read: gives a file's weights and columns, ``source`` among them.
        layout: of the weights.
        skip: batches that were read before.

    Raises:
        AdapterError: the server of a file misbehaves; no row is to blame for that.
    """
    size = batch_rows(layout)
    for start in range(skip * size, len(names), size):
        vectors, rows, problems = [], [], []
        for name in names[start : start + size]:
            try:
                vector, row = read(name)
            except (AdapterError, LayoutError, DataError) as error:
                if getattr(error, "reason", "") == "remote":
                    raise
                problems.append(Problem(name, str(error).removeprefix(f"{name}: ")))
                continue
            vectors.append(vector)
            rows.append(row)
        table, odd = _table(rows)
        problems += [Problem(rows[k]["source"], reason) for k, reason in odd.items()]
        vectors = [vector for k, vector in enumerate(vectors) if k not in odd]
        weights = np.stack(vectors) if vectors else np.empty((0, layout.size), np.float32)
        yield Batch(weights, table, problems)


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[pa.Table, dict[int, str]]:
    """The rows as a table of all their columns, and rows whose values are of an odd kind."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    odd: dict[int, str] = {}
    schema = pa.schema([])
    for k, row in enumerate(rows):
        try:
            mine = pa.Table.from_pylist([dict(row)]).schema
            schema = pa.unify_schemas([schema, mine], promote_options="permissive")
        except pa.ArrowException as error:
            odd[k] = f"its metadata is of another kind than that of other files ({error})"
    kept = [{name: row.get(name) for name in columns} for k, row in enumerate(rows) if k not in odd]
    return pa.Table.from_pylist(kept, schema), odd


def batch_rows(layout: Layout) -> int:
    """Rows to a batch, so that memory stays the same whatever the layout."""
    return max(1, min(1024, BATCH_BYTES // (4 * layout.size)))


def common_parent(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all files."""
    parents = [set(file.parents) for file in files]
    return max(set.intersection(*parents), key=lambda parent: len(parent.parts))
