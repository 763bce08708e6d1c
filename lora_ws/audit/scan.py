"""Scan many adapter files: in batches, by several processes, never the same content twice."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from uuid import uuid4

from lora_ws.adapters import AdapterRef, find_adapters
from lora_ws.adapters.source import file_sha256
from lora_ws.audit import index_store
from lora_ws.audit.classify import FileResult, Finding, classify_files, refused
from lora_ws.audit.ledger import Ledger, read_starts
from lora_ws.audit.similar import Index
from lora_ws.bundle import Bundle
from lora_ws.bundle.formats import INFO
from lora_ws.config import cache_dir
from lora_ws.errors import ConfigError
from lora_ws.workers import map_batches

# Of what is kept; another one is kept apart.
FORMAT = 2
LOST = "the process that read it ended; it may take too much memory"


@dataclass(frozen=True)
class ScanSpec:
    """How files are judged.

    Attributes:
        bundle: folder of the classifier; None tells of files alone.
        whole: see `classify_files`.
        evidence: see `classify_files`.
        batch: files judged at once; memory holds one batch a process.
        workers: processes; with 1 it is this one.
        cache: folder for what is known of contents; None takes the user's.
    """

    bundle: Path | None = None
    whole: bool | None = None
    evidence: bool = False
    batch: int = 32
    workers: int = 1
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Scan:
    """What is known of files: a sequence of findings, read from disk when they are asked for.

    Attributes:
        names: as the user calls the files.
        keys: of their contents; empty where nothing is kept.
        loose: findings that are not kept, by row.
        ledger: those that are.
        new: how many files were read now, and not known already.
        bytes_read: of these.
    """

    names: Sequence[str]
    keys: Sequence[str]
    loose: dict[int, Finding]
    ledger: Ledger
    new: int
    bytes_read: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Finding:
        if row in self.loose:
            return self.loose[row]
        found, name = self.ledger.get(self.keys[row]), self.names[row]
        return replace(found, file=name, message=found.message.replace(found.file, name))

    def __iter__(self) -> Iterator[Finding]:
        return (self[row] for row in range(len(self)))

    def index(self) -> Index:
        """The signatures of the files that were read whole, by the user's names."""
        kept = self.ledger.index()
        at = {key: row for row, key in enumerate(kept.rows["name"].to_pylist())}
        pairs = [(name, at[k]) for name, k in zip(self.names, self.keys, strict=True) if k in at]
        return kept.select([row for _, row in pairs], [name for name, _ in pairs])


def find_all(what: Sequence[str]) -> list[AdapterRef]:
    """The files under several names, each once; see `find_adapters`."""
    refs = chain.from_iterable(map(find_adapters, what))
    return list({ref.name: ref for ref in refs}.values())


def scan(
    refs: Sequence[AdapterRef], spec: ScanSpec, advance: Callable[[int], None] = lambda _: None
) -> Scan:
    """Judge files; of contents that were judged in this way before, nothing is read but the hash.

    Args:
        refs: the files.
        spec: how.
        advance: told of files that are done.

    Raises:
        DataError: another process scans in the same way.
    """
    settings = {
        "format": FORMAT,
        "lora_ws": version("lora_ws"),
        "bundle": spec.bundle and file_sha256(spec.bundle / INFO),
        "evidence": spec.evidence,
    }
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = (spec.cache or cache_dir() / "scan") / mark
    keys: list[str] = []
    loose: dict[int, Finding] = {}
    new = bytes_read = 0
    with Ledger.writing(folder, settings) as ledger:
        stage = partial(_stage, spec, folder, str(uuid4()))
        starts = range(0, len(refs), spec.batch)
        batches = (list(refs[start : start + spec.batch]) for start in starts)
        for judged in map_batches(stage, batches, spec.workers, _lost):
            ledger.add(judged)
            for one in judged:
                kept = one.key in ledger.starts
                if one.finding is not None:
                    new, bytes_read = new + 1, bytes_read + one.finding.bytes_read
                    if not kept:
                        loose[len(keys)] = one.finding
                keys.append(one.key if kept else "")
            advance(len(judged))
    return Scan([ref.name for ref in refs], keys, loose, ledger, new, bytes_read)


def library(
    what: Sequence[str], spec: ScanSpec, advance: Callable[[int], None] = lambda _: None
) -> Index:
    """The signatures of known adapters, to find the likes of others.

    Args:
        what: the folder of an `Index`, or names as `find_all` takes them.
        spec: how files are read; its classifier is left out.
        advance: see `scan`.

    Raises:
        ConfigError: none of the files could be read.
    """
    if len(what) == 1 and (Path(what[0]) / index_store.HEAD).is_file():
        return Index.open(what[0])
    found = scan(find_all(what), replace(spec, bundle=None, evidence=False), advance)
    index = found.index()
    if not len(index):
        why = f": {next(iter(found)).message}" if len(found) else ""
        raise ConfigError(f"{', '.join(what)}: expected adapter files, found none to read{why}")
    return index


def _lost(ref: AdapterRef) -> FileResult:
    return FileResult("", refused(ref, "failed", LOST))


def _stage(spec: ScanSpec, ledger: Path, run: str, refs: list[AdapterRef]) -> list[FileResult]:
    bundle = spec.bundle and _bundle(spec.bundle, run)
    known = _known(ledger, run)
    return classify_files(refs, bundle, whole=spec.whole, evidence=spec.evidence, known=known)


@lru_cache(maxsize=1)
def _bundle(folder: Path, _run: str) -> Bundle:
    """Read once by every process of a run."""
    return Bundle.load(folder)


@lru_cache(maxsize=1)
def _known(ledger: Path, _run: str) -> dict[str, int]:
    """What was known before the run."""
    return read_starts(ledger)
