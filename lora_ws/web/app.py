"""The server: what a client sends is judged and forgotten; no path of a client is ever opened."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field, field_serializer
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lora_ws.adapters import AdapterRef
from lora_ws.adapters.header import LIMITS, shown
from lora_ws.audit.classify import Finding, classify_files
from lora_ws.audit.policy import Reviewed
from lora_ws.audit.provenance import Provenance
from lora_ws.audit.report import Report
from lora_ws.audit.similar import Index
from lora_ws.bundle import Bundle
from lora_ws.bundle.shipped import ShippedReader
from lora_ws.report.page import script, source_hash, style, templates

# One file of a public repository; nothing that could name a place on this machine.
# One pattern says all, so that the OpenAPI page promises what is checked. No two dots in a row: no
# `..` leaves the repository. Ranges instead of \w, which languages read differently.
HUB_FILE = (
    r"^hub:[A-Za-z0-9](\.?[A-Za-z0-9_-])*/[A-Za-z0-9](\.?[A-Za-z0-9_-])*"
    "/[A-Za-z0-9_](\\.?[A-Za-z0-9_ /+\u00c0-\ud7ff-])*\\.safetensors"
    r"(@[A-Za-z0-9_](\.?[A-Za-z0-9_/-])*)?$"
)
NEAREST = 5
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODY = {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"description": "no request of this API, or another host is meant"},
    403: {"description": "sent by a page of another site"},
    408: {"description": "the upload took too long"},
    413: {"description": "larger than max_mb"},
    415: {"description": "a form; expected the bytes of the file as the body"},
    503: {"description": "too many files at once"},
}
HEADERS = {
    # The report stands in a frame, which inherits this: the script of all pages, named by its hash,
    # is the only one that runs in it, and nothing is fetched.
    "Content-Security-Policy": f"default-src 'none'; script-src 'self' {source_hash(script())}; "
    f"style-src {source_hash(style())}; connect-src 'self'; img-src data:; frame-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class ServerLimits:
    """What the server takes.

    Attributes:
        max_mb: of a file, uploaded or on the Hub.
        upload_s: seconds that an upload may take.
        at_once: files that are judged side by side.
        waiting: files that may wait; more are turned away.
    """

    max_mb: int = 300
    upload_s: float = 300
    at_once: int = 1
    waiting: int = 8


class HubRequest(BaseModel):
    """Which file on the Hub to judge."""

    id: Annotated[str, Field(pattern=HUB_FILE, max_length=400)]


class Near(BaseModel):
    """A known adapter, and the cosine of its update with that of the file."""

    name: str
    cosine: float


class Result(BaseModel):
    """What is known of a file. A file that cannot be read has a `reason` and a `message`."""

    finding: Finding
    nearest: list[Near]
    report: str

    # Without a type of what it returns, OpenAPI describes a `Finding`.
    @field_serializer("finding")
    def _plain(self, finding: Finding):
        return finding.to_dict()


class About(BaseModel):
    """What the server judges with."""

    classes: list[str]
    base: str
    known: int
    max_mb: int


class _Room:
    """Takes in so many files, judges few of them at a time, and turns the rest away."""

    def __init__(self, limits: ServerLimits) -> None:
        self._left = limits.at_once + limits.waiting
        self.judging = asyncio.Semaphore(limits.at_once)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        if self._left <= 0:
            raise HTTPException(503, "too many files at once; try again", {"Retry-After": "5"})
        self._left -= 1
        try:
            yield
        finally:
            self._left += 1


def create_app(
    bundle: Bundle | ShippedReader | None = None,
    index: Index | None = None,
    limits: ServerLimits = ServerLimits(),
    hosts: tuple[str, ...] = LOOPBACK,
    source: tuple[str, Path] | None = None,
) -> FastAPI:
    """Make the server.

    Args:
        bundle: the classifier; without one, only facts of files are reported.
        index: known adapters to compare with.
        limits: what it takes.
        hosts: names under which it is called; others are refused, which keeps pages elsewhere from
            reaching a server on this machine. ``("*",)`` takes all.
        source: what the classifier is called, and the folder of its bundle, for the reports.
    """
    app = FastAPI(title="lora_ws", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.middleware("http")(_guard)
    about = About(
        classes=list(bundle.classes) if bundle else [],
        base=bundle.base if bundle else "",
        known=len(index) if index else 0,
        max_mb=limits.max_mb,
    )
    examine = partial(_examine, bundle=bundle, index=index, limits=limits, source=source)
    _add_page(app)
    _add_api(app, about, limits, examine)
    return app


def _add_page(app: FastAPI) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return templates().from_string(_asset("page.html")).render()

    @app.get("/page.js", include_in_schema=False)
    def page_script() -> Response:
        return Response(_asset("page.js"), media_type="text/javascript")


def _add_api(
    app: FastAPI, said: About, limits: ServerLimits, examine: Callable[[AdapterRef], Result]
) -> None:
    room = _Room(limits)

    async def judged(ref: AdapterRef) -> Result:
        async with room.judging:
            return await asyncio.to_thread(examine, ref)

    @app.get("/v1/about")
    def about() -> About:
        """What the server judges with."""
        return said

    @app.post("/v1/file", openapi_extra={"requestBody": BODY}, responses=ANSWERS)
    async def file(
        request: Request, name: Annotated[str, Query(max_length=200)] = "upload.safetensors"
    ) -> Result:
        """Judge the file that is the body of the request; `name` is what to call it."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "expected the file as the body (curl --data-binary @file)")
        async with room.enter():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "upload.safetensors")
                await _receive(request, path, limits)
                return await judged(AdapterRef(shown(name).strip("`"), path))

    @app.post("/v1/hub", responses=ANSWERS)
    async def hub(asked: HubRequest) -> Result:
        """Judge a file on the Hub; with a classifier only the layers that it needs are fetched."""
        async with room.enter():
            return await judged(AdapterRef.parse(asked.id))


def _examine(
    ref: AdapterRef,
    bundle: Bundle | ShippedReader | None,
    index: Index | None,
    limits: ServerLimits,
    source: tuple[str, Path] | None,
) -> Result:
    bounds = replace(LIMITS, total_bytes=limits.max_mb * 1_000_000)
    (judged,) = classify_files([ref], bundle, evidence=True, limits=bounds)
    assert judged.finding is not None  # nothing is known already
    near = index.query(judged.signature.sketch, NEAREST) if index and judged.signature else []
    made, report = Provenance.now(*(source or (None, None)), rules=False), Report()
    report.add(Reviewed(judged.finding, nearest=tuple(near)))
    return Result(
        finding=judged.finding,
        nearest=[Near(name=match.name, cosine=match.cosine) for match in near],
        report=report.page(ref.name, made, bundle=bundle, bytes_read=judged.finding.bytes_read),
    )


async def _receive(request: Request, path: Path, limits: ServerLimits) -> None:
    """Write the body to a file, as long as it is neither too large nor too slow."""
    left = limits.max_mb * 1_000_000
    try:
        async with asyncio.timeout(limits.upload_s):
            with path.open("wb") as out:
                async for chunk in request.stream():
                    left -= len(chunk)
                    if left < 0:
                        most = f"expected a file of at most {limits.max_mb} MB"
                        raise HTTPException(413, most)
                    out.write(chunk)
    except TimeoutError as error:
        raise HTTPException(408, f"expected the file within {limits.upload_s:g} s") from error


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse what pages of other sites send, and say in every answer what a browser may do."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        response = Response("expected a request of this server's own page", 403)
    else:
        response = await call_next(request)
    response.headers.update(HEADERS)
    return response


def _asset(name: str) -> str:
    return resources.files("lora_ws.web").joinpath(name).read_text(encoding="utf-8")
