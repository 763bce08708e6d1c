"""`lora-ws serve`: drop a file on a page, or ask an API, and see what it is."""

import sys

import uvicorn

from lora_ws.web.serve import ServeSpec, make_app


def serve(spec: ServeSpec) -> None:
    """Serve a page and an API (its description: /openapi.json) that judge single adapter files.

    There is no login: on another host than this machine, put a server with one in front.
    """
    app = make_app(spec)
    if not spec.local:
        text = f"lora-ws: {spec.host} can be reached from elsewhere, and there is no login"
        print(text, file=sys.stderr)  # noqa: T201
    uvicorn.run(app, host=spec.host, port=spec.port)
