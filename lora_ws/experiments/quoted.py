"""Numbers of others, as they printed them, beside what is measured here."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Section


@dataclass(frozen=True)
class PublishedTable:
    """Numbers of others.

    Attributes:
        title: what they are.
        head: of the columns.
        rows: as printed.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def published_section(source: str, tables: Sequence[PublishedTable], *more: str) -> Section:
    """A section of a report.

    Args:
        source: of the numbers.
        tables: the numbers.
        more: what else is to be said.
    """
    grids = [Grid(t.head, tuple(tuple(map(Cell, row)) for row in t.rows), t.title) for t in tables]
    return Section("Published", (source, *grids, *more))
