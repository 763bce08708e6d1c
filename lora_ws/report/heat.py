"""Heat maps in HTML: numbers as coloured cells, each with its value as a tooltip."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

# Colours of the largest number, of none, and of the smallest where signs matter.
HIGH, NONE, LOW = (184, 68, 32), (247, 246, 243), (38, 92, 158)
STYLE = """
table.heat { border-collapse: separate; border-spacing: 1px; font-size: .72rem; }
table.heat th, table.heat td { padding: 0; }
table.heat td { min-width: .8rem; height: .95rem; }
table.heat thead th { border: 0; vertical-align: bottom; font-weight: normal; }
table.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
p.caption { color: #5a6472; font-size: .85rem; max-width: 60rem; margin: .4rem 0; }
table.heat tbody tr { border: 0; }
table.heat tbody th { padding-right: .6rem; text-align: left; font-weight: normal;
  max-width: 22rem; overflow: hidden; text-overflow: ellipsis; }
"""


@dataclass(frozen=True)
class Heat:
    """A map: names of rows and columns, a number or nothing in each cell.

    Attributes:
        columns: their names.
        rows: names.
        values: one sequence per row; None where there is no number.
        caption: what a number is.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    caption: str


def to_html(heat: Heat) -> str:
    """A table and its caption; all text is escaped. The deepest colour is the largest of a row."""
    head = "".join(f"<th><span>{html.escape(name)}</span></th>" for name in heat.columns)
    body = [
        f'<tr><th title="{html.escape(name)}">{html.escape(name)}</th>{_cells(heat, row)}</tr>'
        for name, row in zip(heat.rows, heat.values, strict=True)
    ]
    rows = "\n".join(body)
    return (
        f'<table class="heat"><thead><tr><th></th>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table>"
        # Beside the table: inside, it would be as narrow as a few cells.
        f'<p class="caption">{html.escape(heat.caption)}</p>'
    )


def _cells(heat: Heat, row: Sequence[float | None]) -> str:
    top = max((abs(value) for value in row if value is not None), default=0) or 1
    cells = []
    for name, value in zip(heat.columns, row, strict=True):
        if value is None:
            cells.append("<td></td>")
            continue
        title = f"{html.escape(name)}: {value:.3g}"
        cells.append(f'<td style="background:{color(value / top)}" title="{title}"></td>')
    return "".join(cells)


def color(share: float) -> str:
    """The colour of a number from -1 to 1.

    Example:
        >>> color(0), color(1)
        ('#f7f6f3', '#b84420')
    """
    end = HIGH if share >= 0 else LOW
    # Small numbers keep some colour.
    depth = min(abs(share), 1) ** 0.7
    mixed = (round(none + depth * (one - none)) for none, one in zip(NONE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)
