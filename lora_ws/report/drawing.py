"""What all charts share: colours, marks, and how a figure is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Told apart by readers of any colour vision (M. Okabe and K. Ito, Color Universal Design, 2002).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS, LINES = "osD^vP", ("-", "--", "-.", ":")


class Look(NamedTuple):
    """How a series is drawn; no two of the first 28 look the same, in black and white too."""

    color: str
    marker: str
    linestyle: str


def look(k: int) -> Look:
    """The k-th series' look: colours come again with the next mark and line.

    Example:
        >>> look(0).color == look(len(COLORS)).color, look(0) == look(len(COLORS))
        (True, False)
    """
    again = k // len(COLORS)
    marker = MARKERS[(k + again) % len(MARKERS)]
    return Look(COLORS[k % len(COLORS)], marker, LINES[again % len(LINES)])


def plot_chance(axes: Axes, chance: float | None, label: str, *, upright: bool = False) -> None:
    """Mark guessing with a dotted line; None draws none."""
    if chance is not None:
        draw = axes.axvline if upright else axes.axhline
        draw(chance, color="0.4", linestyle=":", label=label, zorder=1)


def roomy(values: Sequence[tuple[float, float]], chance: float | None) -> tuple[float, float]:
    """Limits that hold means, their error bars and chance, with a little room.

    Args:
        values: (mean, standard deviation) of each.
        chance: None where there is none.

    Example:
        >>> low, high = roomy([(10.0, 2.0), (30.0, 0.0)], None)
        >>> low < 8 < 30 < high < 32
        True
    """
    ends = [m + sign * s for m, s in values for sign in (-1, 1)]
    ends += [] if chance is None else [chance]
    margin = 0.05 * (max(ends) - min(ends)) or 0.05
    return min(ends) - margin, max(ends) + margin


def save(figure: Figure, file: Path, *, vector: bool = True) -> Path:
    """Write a figure as PNG, and as SVG beside it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    if vector:
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    return file
