"""Published numbers, as printed, shown beside what is measured here."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Section


@dataclass(frozen=True)
class PublishedTable:
    """A published table.

    Attributes:
        title: its caption.
        head: of the columns.
        rows: as printed.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def published_section(source: str, tables: Sequence[PublishedTable], *more: str) -> Section:
    """Section of published numbers.

    Args:
        source: of the numbers.
        tables: the numbers.
        more: paragraphs after the tables.
    """
    grids = [Grid(t.head, tuple(tuple(map(Cell, row)) for row in t.rows), t.title) for t in tables]
    return Section("Published", (source, *grids, *more))
