"""What an importer is: rows in batches, in a fixed order, every value checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from lora_ws.adapters.layout import Layout

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


def batch_rows(layout: Layout) -> int:
    """Rows to a batch, so that memory stays the same whatever the layout."""
    return max(1, min(1024, BATCH_BYTES // (4 * layout.size)))


def common_parent(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all files."""
    parents = [set(file.parents) for file in files]
    return max(set.intersection(*parents), key=lambda parent: len(parent.parts))
