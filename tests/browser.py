"""Pages in Debian's Chromium, headless: what a reader's browser makes of them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
# Run by a script at the end of the page: what was loaded, and from where.
PROBE = """<script>document.documentElement.setAttribute("data-probe", JSON.stringify({
  images: document.images.length,
  shown: [...document.images].filter(i => i.complete && i.naturalWidth > 0).length,
  fetched: performance.getEntriesByType("resource").map(e => e.name)
    .filter(n => !n.startsWith("data:")),
  wide: document.documentElement.scrollWidth > window.innerWidth,
}))</script>"""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
]


def open_page(page: Path, folder: Path) -> tuple[str, dict]:
    """The document as the browser holds it, and what the probe saw; skips without Chromium."""
    import html
    import json

    if CHROMIUM is None:
        pytest.skip("no Chromium (Debian's package chromium)")
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", probed.as_uri()]
    env = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return done.stdout, json.loads(html.unescape(found[1]))
