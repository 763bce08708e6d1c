"""`lora-ws serve`: drop a file on a page, or ask an API, and see what it is."""

import sys

import uvicorn

from lora_ws.audit.scan import ScanSpec, library
from lora_ws.bundle import Bundle
from lora_ws.report.progress import progress
from lora_ws.web.app import LOOPBACK, ServerLimits, create_app


def serve(
    *,
    model: str | None = None,
    revision: str | None = None,
    allow_classes: tuple[str, ...] = (),
    index: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_mb: int = 300,
    at_once: int = 1,
    waiting: int = 8,
) -> None:
    """Serve a page and an API (its description: /openapi.json) that judge single adapter files.

    There is no login: on another host than this machine, put a server with one in front.

    Args:
        model: folder of a bundle, or its Hub repository; null tells of files alone
        revision: Hub revision of the bundle.
        allow_classes: dotted paths of representations and networks outside this library that the
            bundle may name.
        index: known adapters to compare with: a folder, a .txt list, a name on the Hub, or the
            folder of an index
        host: address to listen on.
        port: port to listen on.
        max_mb: largest file, uploaded or on the Hub.
        at_once: files that are judged side by side.
        waiting: files that may wait; more are turned away.
    """
    bundle = known = None
    if model:
        bundle = Bundle.from_pretrained(model, revision=revision, allow_classes=allow_classes)
    if index:
        with progress("read", None) as advance:
            known = library([index], ScanSpec(), advance)
    local = host in LOOPBACK
    if not local:
        text = f"lora-ws: {host} can be reached from elsewhere, and there is no login"
        print(text, file=sys.stderr)  # noqa: T201
    limits = ServerLimits(max_mb=max_mb, at_once=at_once, waiting=waiting)
    app = create_app(bundle, known, limits, LOOPBACK if local else ("*",))
    uvicorn.run(app, host=host, port=port)
