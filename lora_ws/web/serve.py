"""Make the server from a spec: what `lora-ws serve` serves, for Python."""

from dataclasses import dataclass

from fastapi import FastAPI

from lora_ws.audit.scan import AUTO, ScanSpec, library
from lora_ws.report.progress import progress
from lora_ws.web.app import LOOPBACK, ServerLimits, create_app


@dataclass(frozen=True)
class ServeSpec:
    """What a server judges with, where it listens, and what it takes.

    Attributes:
        model: bundle, a folder or a Hub repository; auto classifies adapters of tiny-sd with the
            shipped bundle and only describes other files; none describes all files
        revision: Hub revision of the bundle.
        allow_classes: dotted paths of representations and networks outside this library that the
            bundle may use.
        index: known adapters to compare with: a folder, a .txt list, a name on the Hub, or the
            folder of an index
        host: address to listen on.
        port: port to listen on.
        max_mb: maximal file size in MB, for uploads and files on the Hub.
        at_once: files scanned in parallel.
        waiting: maximal number of waiting files; others are refused.
    """

    model: str | None = AUTO
    revision: str | None = None
    allow_classes: tuple[str, ...] = ()
    index: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_mb: int = 300
    at_once: int = 1
    waiting: int = 8

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


def make_app(spec: ServeSpec) -> FastAPI:
    """Load the classifier and the known adapters, and make the server.

    Raises:
        ConfigError: the bundle names a class that is not allowed, or no known adapter can be read.
        NotAvailableError: the bundle is neither on this machine nor on the Hub.
    """
    asked = ScanSpec(spec.model, spec.revision, spec.allow_classes)
    judge = asked.fetched()
    source = (asked.called, judge.folder) if asked.called and judge.folder else None
    known = None
    if spec.index:
        with progress("read", None) as advance:
            known = library([spec.index], ScanSpec(), advance)
    limits = ServerLimits(max_mb=spec.max_mb, at_once=spec.at_once, waiting=spec.waiting)
    hosts = LOOPBACK if spec.local else ("*",)
    return create_app(judge.bundle(), known, limits, hosts, source)
