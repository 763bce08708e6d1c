"""What pages are made of: text that stays text, one style, one script, nothing from elsewhere."""

import re
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Tab, assert_readable, open_tab
from PIL import Image

from lora_ws.experiments.kinds import eval_file
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.heat import Heat
from lora_ws.report.page import (
    Attachment,
    Details,
    Facts,
    Figure,
    Part,
    Section,
    script,
    source_hash,
    style,
    to_page,
)

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"{{ 7*7 }}&amp;]]>"
VOID = re.compile(r"<((?:img|meta|link)\b[^>]*)>")


def png(width: int, height: int) -> bytes:
    """A white image, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = (b"\0" + b"\xff" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def grid(text: str) -> Grid:
    return Grid((text, "n"), ((Cell(text, link="x"), *ranked([1.0], [text])),), text)


@pytest.fixture
def figure(tmp_path: Path) -> Callable[[str], Figure]:
    (tmp_path / "a.png").write_bytes(png(3, 2))
    return lambda text: Figure(tmp_path / "a.png", text, text)


# With a text wherever a text may stand.
PARTS: dict[str, Callable[[str], Part]] = {
    "text": lambda text: text,
    "grid": grid,
    "thumbnail": lambda text: Grid(("a",), ((Cell(text, image=png(1, 1)),),)),
    "heat": lambda text: Heat((text,), (text,), ((1.0,),), text),
    "facts": lambda text: Facts({text: Cell(text)}),
    "tiles": lambda text: Facts({text: Cell(text, link="x")}, tiles=True),
    "attachment": lambda text: Attachment(text, text, text, shown=True),
    "details": lambda text: Details(text, (grid(text), text), "x", open=True),
}


def parsed(page: str) -> ET.Element:
    """The page as XML, without its style and script."""
    page = page.replace(style(), "").replace(script(), "").replace("<!doctype html>", "")
    page = page.replace("<wbr>", "")
    return ET.fromstring(VOID.sub(r"<\1/>", page.replace(" open>", ">")))


def said(page: ET.Element) -> str:
    return "".join(page.itertext()) + "".join(v for e in page.iter() for v in e.attrib.values())


def assert_stays_text(part: Callable[[str], Part]) -> None:
    plain = parsed(to_page("t", [Section("s", (part("x"),))]))
    hostile = parsed(to_page(HOSTILE, [Section(HOSTILE, (part(HOSTILE),))]))
    # The same elements and attributes, whatever the text is.
    assert [(e.tag, list(e.attrib)) for e in hostile.iter()] == [
        (e.tag, list(e.attrib)) for e in plain.iter()
    ]
    assert said(hostile).count(HOSTILE) >= 4


@pytest.mark.parametrize("kind", PARTS)
def test_text_stays_text(kind: str) -> None:
    assert_stays_text(PARTS[kind])


def test_text_of_pictures_stays_text(figure: Callable[[str], Figure]) -> None:
    assert_stays_text(figure)


def test_words_between_backticks_are_code_and_stay_text() -> None:
    text, code = "drawn for `a <b> & c`, twice", "<code>a &lt;b&gt; &amp; c</code>"
    grid = Grid(("what",), ((Cell(text),),), caption=text)
    page = to_page("Title", [Section("Text", (text, grid))])
    assert page.count(code) == 3
    assert "<b>" not in page
    assert "&lt;code" not in page


def test_long_words_break_at_their_parts_alone() -> None:
    short, long = "attn2.to_v", "runs/my_long.HistGradientBoosting"
    grid = Grid(("what",), ((Cell(short), Cell(f"`{long}`"), Cell(long, "best")),))
    page = to_page("Title", [Section("Text", (grid, Details(long, ())))])
    assert short in page
    parts = "runs/<wbr>my_<wbr>long.<wbr>Hist<wbr>Gradient<wbr>Boosting"
    assert page.count(parts) == 3
    assert long not in page


def test_a_page_lets_nothing_run_but_its_own_script() -> None:
    page = to_page("t", [Section("s", ("text",))])
    meta = parsed(page).find(".//meta[@http-equiv='Content-Security-Policy']")
    assert meta is not None
    policy = dict(one.strip().split(" ", 1) for one in meta.attrib["content"].split(";"))
    (own,) = re.findall(r"<script>(.*)</script>", page, re.DOTALL)
    (sheet,) = re.findall(r"<style>(.*)</style>", page, re.DOTALL)
    assert policy["script-src"] == source_hash(own)
    assert policy["style-src"] == source_hash(sheet)
    assert policy["default-src"] == "'none'"
    # Inline styles would not be applied.
    assert " style=" not in page


def test_a_picture_has_its_size_and_says_what_it_shows(figure: Callable[[str], Figure]) -> None:
    image = parsed(to_page("t", [Section("s", (figure("a cat"),))])).find(".//img")
    assert image is not None
    assert (image.get("width"), image.get("height"), image.get("alt")) == ("3", "2", "a cat")


def test_marks_have_a_legend_where_there_are_any() -> None:
    row = ranked([2.0, 1.0], ["a", "b"])
    assert (
        Grid(("x", "y"), (tuple(row),), "n = 1.").note
        == "n = 1. Bold: best; underlined: second best."
    )
    assert Grid(("x",), ((row[0],),), top="largest").note == "Bold: largest."
    assert Grid(("x",), ((Cell("a"),),), "n = 1.").note == "n = 1."


NUMBERS = {"beta": "9.5 ± 1.0", "alpha": "–", HOSTILE: "−3.0", "gamma": "10.0 ± 0.1"}


def names(tab: Tab, table: int = 0) -> list[str]:
    """First cells of the rows that are shown."""
    rows = f"document.querySelectorAll('table.data')[{table}].tBodies[0].rows"
    return tab.value(f"[...{rows}].filter(r => r.checkVisibility()).map(r => r.cells[0].innerText)")


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """A page of every part, the tables in a section with enough rows to filter."""
    rows = tuple((Cell(name), Cell(number)) for name, number in NUMBERS.items())
    table = Grid(("name", "n"), rows, HOSTILE)
    parts = (*(part(HOSTILE) for part in PARTS.values()),)
    sections = [
        Section(
            "Tables",
            (Facts({"to": Cell("y", link="far")}), table, Details("more", (table,), open=True)),
        ),
        Section(HOSTILE, parts),
        Section("Closed", (Details("far", (HOSTILE,), "far"),)),
    ]
    page = tmp_path / "page.html"
    page.write_text(to_page(HOSTILE, sections), encoding="utf-8")
    with open_tab(page.as_uri(), tmp_path) as tab:
        yield tab


@pytest.mark.slow
def test_a_person_sorts_filters_and_follows_links(tab: Tab) -> None:
    given = list(NUMBERS)
    assert names(tab) == given
    # By the mouse: numbers by their size, the largest first; what has none last, both ways.
    tab.value("document.querySelectorAll('th button')[1].click()")
    assert names(tab) == ["gamma", "beta", HOSTILE, "alpha"]
    tab.value("document.querySelectorAll('th button')[1].click()")
    assert names(tab) == [HOSTILE, "beta", "gamma", "alpha"]
    # By keys: text from a to z. A reader of the screen is told.
    tab.value("document.querySelectorAll('th button')[0].focus()")
    tab.press("Enter")
    assert [name for name in names(tab) if name != HOSTILE] == ["alpha", "beta", "gamma"]
    assert tab.value("document.querySelector('th').ariaSort") == "ascending"
    # Words in any order, in all tables of the section.
    tab.value("document.querySelector('input').focus()")
    tab.call("Input.insertText", text="10.0 GAM")
    assert (names(tab), names(tab, 1)) == (["gamma"], ["gamma"])
    assert tab.value("document.querySelector('output').innerText") == "2 of 8"
    # A link opens what it leads to.
    assert not tab.value("document.getElementById('far').open")
    tab.value("document.querySelector('dd a').click()")
    tab.wait("document.getElementById('far').open")


def bare(tab: Tab, folder: Path) -> list[float]:
    """Of each part that may scroll: the share of its right edge in which the paper shows."""
    tab.picture(folder / "seen.png")
    seen = np.asarray(Image.open(folder / "seen.png").convert("RGB"))
    boxes = tab.value(
        "[...document.querySelectorAll('.scroll')].map((box) => box.getBoundingClientRect())"
        ".map((box) => [box.right, box.top, box.bottom].map(Math.floor))"
    )
    paper = seen[0, 0]
    return [
        (seen[top + 1 : end - 1, right - 1] == paper).all(1).mean() for right, top, end in boxes
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_what_goes_on_to_the_right_says_so(tmp_path: Path, dark: bool) -> None:
    (tmp_path / "wide.png").write_bytes(png(900, 40))
    (tmp_path / "small.png").write_bytes(png(90, 40))
    table = Grid(tuple("abcdefgh"), ((Cell("name"), *[Cell("1234.5")] * 7),))
    heat = Heat(tuple("abcdefghijklmnopqrstuvwxyz"), ("row",), ((1.0,) * 26,), "")
    parts = (table, Figure(tmp_path / "wide.png", "wide"), heat)
    parts += (grid("narrow"), Figure(tmp_path / "small.png", "narrow"))
    page = tmp_path / "page.html"
    page.write_text(to_page("Title", [Section("Parts", parts)]), encoding="utf-8")
    with open_tab(page.as_uri(), tmp_path) as tab:
        tab.look(400, dark=dark)
        assert bare(tab, tmp_path) == [0, 0, 0, 1, 1]
        tab.value("document.querySelectorAll('.scroll').forEach((box) => (box.scrollLeft = 9999))")
        assert bare(tab, tmp_path) == [1, 1, 1, 1, 1]


@pytest.mark.slow
def test_text_runs_nothing_and_is_readable(tab: Tab) -> None:
    assert_readable(tab)
    assert tab.value("document.scripts.length") == 1
    assert tab.value("[...document.images].every(i => i.src.startsWith('data:'))")
    # Nor would a script that were let in.
    tab.value(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.ran = true'}))"
    )
    assert not tab.value("window.ran")


@pytest.mark.slow
def test_committed_reports_are_readable(tmp_path: Path) -> None:
    pages = sorted((eval_file("table1").parent / "results").glob("*/report.html"))
    assert len(pages) >= 8
    with open_tab(pages[0].as_uri(), tmp_path) as tab:
        for page in pages:
            tab.go(page.as_uri())
            assert_readable(tab)
