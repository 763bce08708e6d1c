"""Photograph the pages that docs/scan.md shows: a report of `scan`, and the page of `serve`.

The report is the one that notebook 05 makes. Run it after a change of these pages, and
`thumbnails.py` after it; it needs Debian's Chromium.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from lora_ws.audit.examples import examples

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
from browser import Tab, open_tab  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH = 1280


def report() -> Path:
    """Run notebook 05 in a folder of its own, which becomes the working folder."""
    cells = json.loads((ROOT / "notebooks/05_triage.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Path] = {}
    for cell in code[:-1]:  # the last shows the page in the notebook
        exec(cell, names)
    return names["page"].absolute()


@contextmanager
def served() -> Iterator[str]:
    """A server on a free port: its address."""
    command = [sys.executable, "-m", "lora_ws", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as child:
        assert child.stderr is not None
        said = (re.search(r"running on (http://\S+)", line) for line in child.stderr)
        yield next(match[1] for match in said if match)
        child.terminate()


def photograph(tab: Tab, name: str, height: int) -> None:
    """Keep the top of a page, in few colours."""
    tab.picture(Path(f"{name}.png"))
    image = Image.open(f"{name}.png").convert("RGB")
    image.crop((0, 0, image.width, height)).quantize(64).save(IMAGES / f"{name}.png", optimize=True)


def main() -> None:
    """Photograph both."""
    page = report()
    with served() as address, open_tab(page.as_uri(), Path.cwd()) as tab:
        tab.look(WIDTH)
        photograph(tab, "scan", 2080)
        tab.go(address)
        tab.value("document.getElementById('report').onload = () => (window.framed = true)")
        tab.choose("#file", examples()[1].file)
        tab.wait("window.framed")
        time.sleep(2)  # the frame is drawn by a process of its own
        photograph(tab, "serve", 1420)


if __name__ == "__main__":
    os.environ.setdefault("LORA_WS_CACHE", tempfile.mkdtemp())
    main()
