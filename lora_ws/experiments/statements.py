"""What a publication states, beside what was found here, one line per statement."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Facts

VERDICTS = {True: "reproduced", False: "not reproduced", None: "out of reach"}


class Statement(NamedTuple):
    """One statement of a publication.

    Attributes:
        says: the statement, and its number where it has one.
        found: here.
        by: what it must be, to count as reproduced.
        holds: whether it is; None where it cannot be told here.
    """

    says: str
    found: str
    by: str
    holds: bool | None


class Question(NamedTuple):
    """One question that a publication leaves open.

    Attributes:
        asks: the question.
        found: here.
        by: what would answer it with yes.
        answer: by what was measured.
    """

    asks: str
    found: str
    by: str
    answer: bool


def statements_grid(publication: str, statements: Sequence[Statement | Question]) -> Grid:
    """All statements and questions, one row each.

    Args:
        publication: short name, such as "the paper".
        statements: in the order of the rows.

    Example:
        >>> grid = statements_grid("the post", [Statement("it works", "no", "it does", False)])
        >>> [cell.text for cell in grid.rows[0]]
        ['it works', 'no', 'it does', 'not reproduced']
    """
    rows = tuple(tuple(map(Cell, (*one[:3], _verdict(one)))) for one in statements)
    return Grid((publication, "here", "counts as reproduced if", "verdict"), rows, left=4)


def statement_tiles(statements: Sequence[Statement | Question]) -> Facts:
    """How many of the statements hold, for the head of a page.

    Example:
        >>> tiles = statement_tiles([Statement("it works", "no", "it does", False)]).values
        >>> {name: cell.text for name, cell in tiles.items()}
        {'statements reproduced': '0', 'not reproduced': '1', 'out of reach': '0'}
    """
    counts = Counter(one.holds for one in statements if isinstance(one, Statement))
    tiles = {VERDICTS[holds]: str(counts[holds]) for holds in VERDICTS}
    questions = [one for one in statements if isinstance(one, Question)]
    tiles = {f"statements {VERDICTS[True]}": tiles.pop(VERDICTS[True]), **tiles}
    if questions:
        tiles["open questions answered"] = str(len(questions))
    return Facts({name: Cell(text) for name, text in tiles.items()}, tiles=True)


def _verdict(one: Statement | Question) -> str:
    if isinstance(one, Question):
        return f"open there; here {'yes' if one.answer else 'no'}"
    return VERDICTS[one.holds]
