"""A report: text, tables and figures as Markdown, LaTeX and one self-contained HTML page."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ws.report import heat
from lora_ws.report.grid import Grid, latex, markdown, to_html
from lora_ws.report.heat import Heat

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2430; margin: 2rem auto; padding: 0 1rem;
  max-width: 72rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: #5a6472; padding-top: .6rem;
  max-width: 60rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; max-width: 42rem; }
thead th { border-bottom: 2px solid #1d2430; }
tbody tr { border-bottom: 1px solid #e4e8ee; }
img { max-width: 100%; height: auto; }
figure { margin: 1.2rem 0; } figcaption { color: #5a6472; font-size: .9rem; }
nav a { margin-right: 1rem; }
"""


@dataclass(frozen=True)
class Figure:
    """A picture already written as PNG, with its SVG beside it.

    Attributes:
        file: the PNG.
        caption: what it shows.
    """

    file: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order: paragraphs, tables, figures, maps."""

    title: str
    parts: tuple[str | Grid | Figure | Heat, ...]


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write ``report.md``, ``report.html`` and ``tables.tex`` into a folder.

    The page holds its pictures, so that it can be handed on as one file.
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
        for part in section.parts:
            if isinstance(part, Grid):
                blocks.append(markdown(part))
            elif isinstance(part, Figure):
                name = part.file.relative_to(folder).as_posix()
                blocks.append(f"![{part.caption}]({name})\n\n*{part.caption}*")
            elif isinstance(part, Heat):
                blocks.append(f"*{part.caption}* (in report.html)")
            else:
                blocks.append(part)
    return "\n\n".join(blocks) + "\n"


def to_page(title: str, sections: Sequence[Section]) -> str:
    """One HTML page that needs nothing beside it; all text is escaped."""
    links = "".join(
        f'<a href="#s{k}">{html.escape(section.title)}</a>' for k, section in enumerate(sections)
    )
    body = []
    for k, section in enumerate(sections):
        body.append(f'<h2 id="s{k}">{html.escape(section.title)}</h2>')
        body += [_part(part) for part in section.parts]
    lines = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{heat.STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><nav>{links}</nav>\n{lines}\n</body></html>\n"
    )


def _part(part: str | Grid | Figure | Heat) -> str:
    if isinstance(part, Heat):
        return f'<div class="scroll">{heat.to_html(part)}</div>'
    if isinstance(part, Grid):
        return f'<div class="scroll">{to_html(part)}</div>'
    if isinstance(part, Figure):
        data = base64.b64encode(part.file.read_bytes()).decode()
        caption = html.escape(part.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<p>{html.escape(part)}</p>"
