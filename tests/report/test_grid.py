"""One table in four forms: marks, escapes, and nothing lost."""

import io

import pytest
from rich.console import Console

from lora_ws.report.grid import Cell, Grid, latex, markdown, ranked, show, terminal
from lora_ws.report.page import Section, to_page

GRID = Grid(
    ("Row", "A & B", "100 %"),
    (
        (Cell("a|b"), *ranked([0.5], ["50.0 ± 1.0"]), Cell("<script>")),
        (Cell("x_y"), Cell("3", "second"), Cell("[red]")),
    ),
    "n = 2 & more_of it",
)


def test_the_highest_is_best_and_the_next_second_ties_alike():
    cells = ranked([1.0, 3.0, None, 2.0, 3.0], list("abcde"))
    assert [cell.mark for cell in cells] == ["", "best", "", "second", "best"]
    assert [cell.text for cell in cells] == list("abcde")


def test_markdown_has_a_line_a_row_and_escaped_pipes():
    lines = markdown(GRID).splitlines()
    assert lines[2] == "| a\\|b | **50.0 ± 1.0** | <script> |"
    assert "<u>3</u>" in lines[3]
    assert lines[-1] == f"{GRID.caption} Bold: best; underlined: second best."


def test_latex_escapes_and_marks():
    text = latex(GRID)
    assert r"A \& B & 100 \% \\" in text
    assert r"\textbf{50.0 $\pm$ 1.0}" in text
    assert r"x\_y & \underline{3}" in text
    assert text.count(r"\\") == 3


def test_terminal_shows_brackets_as_text():
    out = io.StringIO()
    Console(file=out, width=200).print(terminal(GRID))
    assert "[red]" in out.getvalue()


@pytest.mark.parametrize("width", [10, 40, 200])
def test_no_number_is_cut_however_narrow_the_terminal(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, soft_wrap=True)
    show(console, GRID)
    text = out.getvalue()
    for row in GRID.rows:
        for cell in row:
            assert cell.text in text
    assert "…" not in text
    assert console.width == width


def test_titles_between_backticks_are_code_on_a_page() -> None:
    grid = Grid(("edit", "`a photo`"), ((Cell("none"), Cell("1")),))
    page = to_page("Title", [Section("One", (grid,))])
    assert '<th scope="col"><code>a photo</code></th>' in page


def test_columns_of_a_group_stand_below_its_title() -> None:
    head = ("Row", "mean", "size: R²", "size: error", "colour: F1")
    row = tuple(map(Cell, ("a", "1", "2", "3", "4")))
    grid = Grid(head, (row,), "n = 1.")
    assert grid.groups == (("", 2), ("size", 2), ("colour", 1))
    assert grid.titles == ("Row", "mean", "R²", "error", "F1")
    names, parts = zip(*grid.by_group(), strict=True)
    assert names == ("", "size", "colour")
    assert [part.head for part in parts] == [("Row", "mean"), ("Row", "R²", "error"), ("Row", "F1")]
    assert [cell.text for cell in parts[1].rows[0]] == ["a", "2", "3"]
    out = io.StringIO()
    show(Console(file=out, width=30), grid)
    assert max(map(len, out.getvalue().splitlines())) <= 30
    assert markdown(grid).splitlines()[0] == f"| {' | '.join(head)} |"
    single = Grid(("Row", "size: R²"), (row[:2],))
    assert single.groups == ()
    assert single.titles == single.head
    assert [part.head for _, part in single.by_group()] == [single.head]
