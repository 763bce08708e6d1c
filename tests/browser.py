"""Pages in Debian's Chromium, headless: what a reader's browser makes of them."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.sync.client import connect

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


def chromium() -> str:
    """The browser's program; without it the test is skipped, or fails where CI asks for it."""
    if found := shutil.which("chromium"):
        return found
    missing = "no Chromium (Debian's package chromium)"
    if os.environ.get("LORA_WS_NEED_BROWSER"):
        pytest.fail(missing)
    pytest.skip(missing)


def open_page(page: Path, folder: Path) -> tuple[str, dict]:
    """The document as the browser holds it, and what the probe saw; skips without Chromium."""
    command = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    probed = folder / "probed.html"
    probed.write_text(
        page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    command += ["--virtual-time-budget=5000", "--dump-dom", probed.as_uri()]
    env = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, env=env, capture_output=True, timeout=120, encoding="utf-8")
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return done.stdout, json.loads(html.unescape(found[1]))


class Tab:
    """A page that a test acts on, through Chromium's DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0

    def call(self, method: str, **params: Any) -> dict:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, script: str) -> Any:
        """What a script gives."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """What a script gives once that is true."""
        for _ in range(300):
            if found := self.value(script):
                return found
            time.sleep(0.1)
        raise AssertionError(
            f"{script} never was; the page says {self.value('document.body.innerText')}"
        )

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file as a person would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def picture(self, file: Path) -> None:
        """Write a PNG of the page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def open_tab(url: str, folder: Path) -> Iterator[Tab]:
    """A tab on a page; skips without Chromium."""
    command = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command += ["--remote-debugging-port=0", "about:blank"]
    env = {**os.environ, "HOME": str(folder)}
    child = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        assert child.stderr is not None
        line = next(line for line in child.stderr if "DevTools listening on" in line)
        Thread(target=child.stderr.read, daemon=True).start()
        home = line.split()[-1].split("/")[2]
        tabs = json.loads(urlopen(f"http://{home}/json").read())
        (address,) = [tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"]
        with connect(address, max_size=None) as socket:
            tab = Tab(socket)
            tab.call("Page.navigate", url=url)
            tab.wait("document.readyState === 'complete'")
            yield tab
    finally:
        child.kill()
        child.wait()
