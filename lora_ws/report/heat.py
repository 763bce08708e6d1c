"""Heat maps: numbers as coloured cells, drawn by `page`."""

from collections.abc import Iterator
from dataclasses import dataclass

# Depths of colour.
STEPS = 10


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

    def levels(self) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
        """Name each row, then column, number as text and colour of its cells.

        The deepest colour is the largest of a row; both texts are empty where there is no number.

        Example:
            >>> list(Heat(("a", "b"), ("row",), ((2.0, None),), "").levels())
            [('row', [('a', '2', 'h10'), ('b', '', '')])]
        """
        for name, row in zip(self.rows, self.values, strict=True):
            top = max((abs(value) for value in row if value is not None), default=0) or 1
            cells = [
                (column, "", "") if value is None else (column, f"{value:.3g}", level(value / top))
                for column, value in zip(self.columns, row, strict=True)
            ]
            yield name, cells


def level(share: float) -> str:
    """Name the colour of a number from -1 to 1: ``h`` above zero, ``l`` below, and its depth.

    Example:
        >>> level(0), level(1), level(-0.1)
        ('h0', 'h10', 'l2')
    """
    # Small numbers keep some colour.
    depth = round(STEPS * min(abs(share), 1) ** 0.7)
    return f"{'l' if share < 0 and depth else 'h'}{depth}"
