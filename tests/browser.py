"""Pages in Debian's Chromium, headless: what a reader's browser makes of them."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.sync.client import connect

# Of text on a page, by WCAG 2.2 (1.4.3, level AA).
LEAST_CONTRAST = 4.5
# What was loaded, and from where.
PROBE = """({
  images: document.images.length,
  shown: [...document.images].filter(i => i.complete && i.naturalWidth > 0).length,
  fetched: performance.getEntriesByType("resource").map(e => e.name)
    .filter(n => !n.startsWith("data:")),
  wide: document.documentElement.scrollWidth > window.innerWidth,
})"""
# The least contrast of any text with what is behind it, by WCAG 2, and that text.
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => rgba(color).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (at) => {
    while (at && rgba(getComputedStyle(at).backgroundColor)[3] === 0) at = at.parentElement;
    return at ? getComputedStyle(at).backgroundColor : "white";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = [21, ""];
  while (walker.nextNode()) {
    const at = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !at.checkVisibility() || at.matches("script, style, .spoken")) continue;
    const [a, b] = [light(getComputedStyle(at).color), light(behind(at))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, text];
  }
  return least;
})()"""
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


class Tab:
    """A page that a test acts on, through Chromium's DevTools protocol.

    Attributes:
        errors: what the page threw, and what its console says is wrong.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.errors: list[str] = []

    def call(self, method: str, **params: Any) -> dict:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict) -> None:
        said = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"]["text"])
        if event.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])
        if event.get("method") == "Runtime.consoleAPICalled" and said["type"] == "error":
            self.errors.append(str(said["args"]))

    def go(self, url: str) -> None:
        """Open a page and wait until it is there."""
        self.value("window.left = true")
        self.call("Page.navigate", url=url)
        self.wait("!window.left && document.readyState === 'complete'")

    def look(self, width: int, *, dark: bool = False) -> None:
        """Have a window of that width, and prefer dark colours or light ones."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

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

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text)

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file as a person would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def picture(self, file: Path) -> None:
        """Write a PNG of the page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


def assert_readable(tab: Tab) -> None:
    """On a desk and on a phone, in the light and in the dark."""
    for width, dark in product((1280, 400), (False, True)):
        tab.look(width, dark=dark)
        assert not tab.value(PROBE)["wide"], f"wider than {width}"
        contrast, text = tab.value(CONTRAST)
        assert contrast >= LEAST_CONTRAST, (dark, text)
    assert tab.value("[...document.images].every((image) => image.alt)")
    assert tab.errors == []


def open_page(page: Path, folder: Path) -> tuple[str, dict]:
    """The document as the browser holds it, and what the probe saw; skips without Chromium.

    Any page has to be readable.
    """
    with open_tab(page.absolute().as_uri(), folder) as tab:
        assert_readable(tab)
        return tab.value("document.documentElement.outerHTML"), tab.value(PROBE)


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
            for domain in ("Page", "Runtime", "Log"):
                tab.call(f"{domain}.enable")
            tab.go(url)
            yield tab
    finally:
        child.kill()
        child.wait()
