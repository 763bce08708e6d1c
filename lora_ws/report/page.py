"""A report: text, tables and figures as Markdown, LaTeX and one self-contained HTML page."""

import base64
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lora_ws.report.grid import Cell, Grid, latex, markdown
from lora_ws.report.heat import Heat

# A word that is long for a column, and where it may break: after its parts.
LONG = re.compile(r"[^\s<>]{21,}")
BREAK = re.compile(r"(?<=[./_=,])(?=\w)|(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Figure:
    """An image already written as PNG.

    Attributes:
        file: the PNG.
        caption: what it shows.
        alt: the same for who cannot see it; empty takes the caption.
    """

    file: Path
    caption: str
    alt: str = ""

    @cached_property
    def png(self) -> bytes:
        """The image's bytes."""
        return self.file.read_bytes()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return struct.unpack(">II", self.png[16:24])


@dataclass(frozen=True)
class Facts:
    """Names and values, such as what made a page.

    Attributes:
        values: by name; a cell may lead somewhere.
        tiles: set as large numbers beside each other.
    """

    values: Mapping[str, Cell]
    tiles: bool = False


@dataclass(frozen=True)
class Attachment:
    """A text file that a page carries, to be saved.

    Attributes:
        title: of the link.
        name: of the file.
        text: what is in it.
        shown: whether it also stands on the page.
    """

    title: str
    name: str
    text: str
    shown: bool = False


@dataclass(frozen=True)
class Details:
    """Parts that open and close.

    Attributes:
        title: what stands there while they are closed.
        parts: in order.
        anchor: what links lead here by.
        open: whether they are open at first.
    """

    title: str
    parts: "tuple[Part, ...]"
    anchor: str = ""
    open: bool = False


Part = str | Grid | Figure | Heat | Facts | Attachment | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order.

    Attributes:
        title: the heading.
        parts: in order.
        anchor: what links lead here by; empty takes the number of the section.
    """

    title: str
    parts: tuple[Part, ...]
    anchor: str = ""


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write ``report.md``, ``report.html`` and ``tables.tex`` into a folder.

    The page holds its images, so that it can be handed on as one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grids = [part for s in sections for part in s.parts if isinstance(part, Grid)]
    (folder / "report.md").write_text(_markdown(folder, title, sections), encoding="utf-8")
    (folder / "report.html").write_text(to_page(title, sections), encoding="utf-8")
    (folder / "tables.tex").write_text("\n\n".join(map(latex, grids)) + "\n", encoding="utf-8")


def _markdown(folder: Path, title: str, sections: Sequence[Section]) -> str:
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.title}")
        blocks += [_block(folder, part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _block(folder: Path, part: Part) -> str:
    match part:
        case Grid():
            return markdown(part)
        case Figure():
            name = part.file.relative_to(folder).as_posix()
            return f"![{part.caption}]({name})\n\n*{part.caption}*"
        case Heat():
            return f"*{part.caption}* (in report.html)"
        case Facts():
            return "\n".join(f"- {name}: {cell.text}" for name, cell in part.values.items())
        case Attachment():
            return f"*{part.title}* (in report.html)"
        case Details():
            inner = [_block(folder, one) for one in part.parts]
            return "\n\n".join([f"### {part.title}", *inner])
    return part


def to_page(title: str, sections: Sequence[Section]) -> str:
    """One HTML page that needs nothing beside it.

    All text is escaped by the templates. Its own Content-Security-Policy lets no script run but the
    one that sorts and filters, and fetches nothing.
    """
    page = templates().get_template("page.html")
    return page.render(title=title, sections=sections, policy=content_policy())


def style() -> Markup:
    """The style sheet of all pages."""
    return Markup(templates().get_template("style.css").render())


def script() -> Markup:
    """The script of all pages."""
    return Markup(templates().get_template("page.js").render())


@cache
def content_policy() -> str:
    """What a browser may do on a page, as a Content-Security-Policy."""
    return (
        f"default-src 'none'; img-src data:; style-src {source_hash(style())}; "
        f"script-src {source_hash(script())}; base-uri 'none'; form-action 'none'"
    )


def source_hash(source: str) -> str:
    """Name a script or style sheet by its content, as a Content-Security-Policy does."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def templates() -> Environment:
    """Templates, which escape all that is put into them; those of parts are named after these."""
    made = Environment(
        loader=PackageLoader("lora_ws.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters.update(drawn=_drawn, cell=_cell, prose=_prose, parted=_parted, data=_data)
    made.globals.update(style=style, script=script)
    return made


def _drawn(part: Part) -> Markup:
    name = "text" if isinstance(part, str) else type(part).__name__.lower()
    return Markup(templates().get_template(f"{name}.html").render(part=part))


def _cell(cell: Cell) -> Markup:
    return Markup(templates().get_template("cell.html").render(cell=cell))


def _prose(text: str) -> Markup:
    """A text whose words between backticks are set as code, as Markdown does."""
    # A plain string, because joining parts of a Markup would escape the tags.
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _parted(text: str) -> Markup:
    return Markup(part_words(str(escape(text))))


def part_words(text: str) -> str:
    """Let long words of a text, such as paths and names of layers, break behind their parts.

    Example:
        >>> part_words("layer up_blocks.3.attn2.to_v")
        'layer up_<wbr>blocks.<wbr>3.<wbr>attn2.<wbr>to_<wbr>v'
    """
    return LONG.sub(lambda word: BREAK.sub("<wbr>", word[0]), text)


def _data(content: bytes | str, kind: str) -> str:
    """An address that holds content of a media type."""
    plain = content.encode("utf-8", "replace") if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(plain).decode()}"
