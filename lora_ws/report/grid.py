"""A table as data, and its forms: Markdown, LaTeX, terminal; `page` makes HTML of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

# Between the title of a group of columns and a column's own.
GROUP = ": "
Mark = Literal["", "best", "second"]
MARKDOWN = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}
LATEX = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
TERMINAL = {"": "{}", "best": "[bold]{}[/bold]", "second": "[underline]{}[/underline]"}
_LATEX_SPECIAL = {"±": r"$\pm$", "≤": r"$\leq$", "–": "--", "Δ": r"$\Delta$"}


class Cell(NamedTuple):
    """Text and how it is set.

    Attributes:
        text: what it says; of an image, what it shows.
        mark: how it compares with the others of its column.
        link: on a page, the anchor that it leads to; empty leads nowhere.
        image: on a page, a PNG that stands for the text.
    """

    text: str
    mark: Mark = ""
    link: str = ""
    image: bytes = b""


@dataclass(frozen=True)
class Grid:
    """A table: titles, rows of as many cells, and what it rests on.

    Attributes:
        head: titles of the columns.
        rows: cells.
        caption: below the table.
        left: how many columns hold text, and are set to the left; the others to the right.
        top: what is marked: the "best" cells or, say, the "largest".

    Example:
        >>> print(markdown(Grid(("row", "value"), ((Cell("a"), Cell("1", "best")),), "n = 1.")))
        | row | value |
        |---|--:|
        | a | **1** |
        <BLANKLINE>
        n = 1. Bold: best.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    left: int = 1
    top: str = "best"

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """Group of consecutive columns, ``GROUP: title``, and how many; empty without any."""
        names = [title.partition(GROUP)[0] if GROUP in title else "" for title in self.head]
        found = tuple((name, len([*own])) for name, own in groupby(names))
        return found if any(name and count > 1 for name, count in found) else ()

    @property
    def titles(self) -> tuple[str, ...]:
        """Titles of the columns, below those of their groups."""
        return tuple(t.partition(GROUP)[2] or t for t in self.head) if self.groups else self.head

    def by_group(self) -> "list[tuple[str, Grid]]":
        """A table per group of columns, each with the columns of text; itself without groups."""
        found, start = list[tuple[str, Grid]](), 0
        for name, count in self.groups or (("", len(self.head)),):
            start += count
            own = [k for k in range(start - count, start) if k >= self.left]
            kept = [*range(self.left), *own]
            rows = tuple(tuple(row[k] for k in kept) for row in self.rows)
            found.append((name, Grid(tuple(self.titles[k] for k in kept), rows, left=self.left)))
        return found

    @property
    def note(self) -> str:
        """The caption, and what bold and underlined cells are where there are any."""
        marks = {cell.mark for row in self.rows for cell in row}
        said = {"best": f"bold: {self.top}", "second": f"underlined: second {self.top}"}
        legend = "; ".join(text for mark, text in said.items() if mark in marks)
        return " ".join(filter(None, [self.caption, legend and f"{legend.capitalize()}."]))


def ranked(values: Sequence[float | None], texts: Sequence[str]) -> list[Cell]:
    """A column of cells, its highest value marked best and the next marked second.

    Args:
        values: what is compared; None stands aside.
        texts: what is shown.
    """
    order = sorted({v for v in values if v is not None}, reverse=True)
    marks: dict[float | None, Mark] = {}
    for value, mark in zip(order, ("best", "second"), strict=False):
        marks[value] = mark  # type: ignore[assignment]
    return [Cell(text, marks.get(value, "")) for value, text in zip(values, texts, strict=True)]


def markdown(grid: Grid) -> str:
    """Pipes."""
    lines = [
        "| " + " | ".join(grid.head) + " |",
        "|" + "---|" * grid.left + "--:|" * (len(grid.head) - grid.left),
    ]
    for row in grid.rows:
        cells = [MARKDOWN[c.mark].format(c.text.replace("|", "\\|")) for c in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", grid.note] if grid.note else lines)


def latex(grid: Grid) -> str:
    """A table that needs the package booktabs."""
    columns = "l" * grid.left + "r" * (len(grid.head) - grid.left)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(grid.note)}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, grid.head)) + r" \\", r"\midrule"]
    for row in grid.rows:
        lines.append(" & ".join(LATEX[c.mark].format(_tex(c.text)) for c in row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def show(console: Console, grid: Grid) -> None:
    """Print the table and its note; where a terminal is too narrow, lines wrap.

    A cut number says nothing. Groups of columns are tables below each other.

    Args:
        console: where to.
        grid: the table.
    """
    width = console.width
    for name, part in grid.by_group():
        table = terminal(part)
        table.title = name or None
        console.width = max(width, Console(width=1000).measure(table).maximum)
        console.print(table)
    console.width = width
    if grid.note:
        console.print(grid.note)


def terminal(grid: Grid) -> Table:
    """The same for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for k, title in enumerate(grid.head):
        table.add_column(title, no_wrap=True, justify="left" if k < grid.left else "right")
    for row in grid.rows:
        table.add_row(*[TERMINAL[c.mark].format(c.text.replace("[", "\\[")) for c in row])
    return table


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    for sign, code in _LATEX_SPECIAL.items():
        text = text.replace(sign, code)
    return text
