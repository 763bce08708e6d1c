"""Scan many adapter files: in batches, by several processes, never the same content twice."""

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from uuid import uuid4

from lora_ws.adapters import AdapterRef, find_adapters
from lora_ws.adapters.source import file_sha256
from lora_ws.addresses import place
from lora_ws.audit import index_store
from lora_ws.audit.classify import FileResult, Finding, classify_files, refused
from lora_ws.audit.ledger import Ledger, code_hash, read_starts
from lora_ws.audit.similar import Index
from lora_ws.bundle import Bundle
from lora_ws.bundle.formats import INFO
from lora_ws.bundle.hub import fetch_bundle
from lora_ws.bundle.shipped import ShippedReader
from lora_ws.config import cache_dir
from lora_ws.errors import ConfigError, printable
from lora_ws.workers import current_engine

# Of what is kept; another one is kept apart.
FORMAT = 3
# Names of no bundle: the shipped one for files of its base, and none at all.
AUTO, NONE = "auto", "none"
# Rules that stand in the folder of a model.
POLICY = "policy.yaml"
LOST = "the process that read it ended; it may take too much memory"


@dataclass(frozen=True)
class ScanSpec:
    """How adapter files are read, classified, flagged and reported.

    Attributes:
        model: bundle, a folder or a Hub repository; auto classifies adapters of tiny-sd with the
            shipped bundle and only describes other files; none describes all files
        revision: Hub revision of the bundle.
        allow_classes: dotted paths of representations and networks outside this library that the
            bundle may use.
        out: HTML page to write, here or at an address such as s3://bucket/page.html.
        json: file to write, with one JSON object per line; or an address.
        csv: CSV file to write; or an address.
        sidecars: write the finding beside each file, where model managers show it: ``<name>.json``
            and ``<name>.civitai.info``; existing keys are kept.
        policy: YAML file of rules for flags; null takes the policy.yaml in --model's folder, such
            as lora-ws detector writes, and without one flags unreadable files only.
        index: known adapters to compare with: a file, folder, list or name on the Hub as above, or
            the folder of an index
        evidence: report how much each layer contributes to a verdict; takes a third more time.
        whole: read every file in full; null reads local files in full, and of files elsewhere only
            the parts that --model needs.
        hashes: compute `update_hash`, a third of the time of a scan without a model; without it
            copies are found by sketches alone, and a policy cannot have a deny or allow list.
        workers: worker processes.
        batch: files per process in memory.
        cache: folder of cached findings; null takes scan/ in the user's cache.
    """

    model: str | None = AUTO
    revision: str | None = None
    allow_classes: tuple[str, ...] = ()
    out: str | Path | None = None
    json: str | Path | None = None
    csv: str | Path | None = None
    sidecars: bool = False
    policy: Path | None = None
    index: str | None = None
    evidence: bool = True
    whole: bool | None = None
    hashes: bool = True
    workers: int = 1
    batch: int = 32
    cache: Path | None = None

    @property
    def rules(self) -> Path | None:
        """The policy asked for, else that in the folder of a model on this machine."""
        if self.policy or self.model in (AUTO, NONE, None):
            return self.policy
        own = Path(self.model) / POLICY
        return own if own.is_file() else None

    def __post_init__(self) -> None:
        for name in ("batch", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("out", "json", "csv"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, place(given))

    def fetched(self) -> "ScanSpec":
        """Fetch the classifier from the Hub where it is not on this machine.

        Raises:
            NotAvailableError: the Hub cannot be reached, or has no such repository or revision.
        """
        if self.model in (None, NONE):
            return replace(self, model=None)
        if self.model == AUTO or Path(self.model).is_dir():
            return self
        folder, _ = fetch_bundle(self.model, self.revision)
        return replace(self, model=str(folder), revision=None)

    @property
    def called(self) -> str | None:
        """The classifier, as reports call it; None without one."""
        if self.model == AUTO:
            return ShippedReader().base
        return None if self.model == NONE else self.model

    @property
    def folder(self) -> Path | None:
        """Of the classifier that was `fetched`; None without one."""
        if self.model == AUTO:
            return ShippedReader().folder
        return Path(self.model) if self.model else None

    def bundle(self) -> Bundle | ShippedReader | None:
        """Load the classifier that was `fetched`, the shipped one when needed; None without one."""
        if self.model == AUTO:
            return ShippedReader()
        return Bundle.load(self.model, allow_classes=self.allow_classes) if self.model else None


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
        return replace(
            found,
            file=name,
            message=found.message.replace(printable(found.file), printable(name)),
        )

    def __iter__(self) -> Iterator[Finding]:
        return (self[row] for row in range(len(self)))

    def index(self) -> Index:
        """Index the files that were read whole, by the user's names."""
        kept = self.ledger.index()
        at = {key: row for row, key in enumerate(kept.rows["name"].to_pylist())}
        pairs = [(name, at[k]) for name, k in zip(self.names, self.keys, strict=True) if k in at]
        return kept.select([row for _, row in pairs], [name for name, _ in pairs])


def scan(
    refs: Sequence[AdapterRef], spec: ScanSpec, advance: Callable[[int], None] = lambda _: None
) -> Scan:
    """Judge files; of contents that were judged in this way before, nothing is read but the hash.

    Args:
        refs: the files.
        spec: how they are read and classified; what is flagged and written is left out.
        advance: called for files that are done.

    Raises:
        DataError: another process scans in the same way.
    """
    spec = spec.fetched()
    settings = {
        "format": FORMAT,
        "code": code_hash(),
        "bundle": spec.folder and file_sha256(spec.folder / INFO),
        "shipped": spec.model == AUTO,
        "evidence": spec.evidence and spec.folder is not None,
        "hashes": spec.hashes,
    }
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = (spec.cache or cache_dir() / "scan") / mark
    keys: list[str] = []
    loose: dict[int, Finding] = {}
    new = bytes_read = 0
    run = str(uuid4())
    with Ledger.writing(folder, settings) as ledger:
        stage = partial(_stage, spec, folder, run)
        starts = range(0, len(refs), spec.batch)
        batches = (list(refs[start : start + spec.batch]) for start in starts)
        judged_batches = current_engine().map_batches(stage, batches, spec.workers, _lost)
        for judged in judged_batches:
            judged = [
                one
                if one.finding or ledger.holds(one.key)
                else _anew(refs[len(keys) + k], spec, run)
                for k, one in enumerate(judged)
            ]
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
    """Index known adapters, to compare others with.

    Args:
        what: the folder of an `Index`, or names as `find_adapters` takes them.
        spec: how files are read; its classifier is left out.
        advance: see `scan`.

    Raises:
        ConfigError: none of the files could be read.
    """
    if len(what) == 1 and (Path(what[0]) / index_store.HEAD).is_file():
        return Index.open(what[0])
    found = scan(find_adapters(*what), replace(spec, model=None), advance)
    index = found.index()
    if not len(index):
        why = f": {next(iter(found)).message}" if len(found) else ""
        raise ConfigError(f"{', '.join(what)}: expected adapter files, found none to read{why}")
    return index


def _anew(ref: AdapterRef, spec: ScanSpec, run: str) -> FileResult:
    """Read a file whose line in the ledger is damaged."""
    bundle = _bundle(spec, run)
    return _classify([ref], bundle, spec)[0]


def _classify(
    refs: Sequence[AdapterRef],
    bundle: Bundle | ShippedReader | None,
    spec: ScanSpec,
    known: Container[str] = (),
) -> list[FileResult]:
    how = {"whole": spec.whole, "evidence": spec.evidence, "hashes": spec.hashes}
    return classify_files(refs, bundle, known=known, **how)


def _lost(ref: AdapterRef) -> FileResult:
    return FileResult("", refused(ref, "failed", LOST))


def _stage(spec: ScanSpec, ledger: Path, run: str, refs: list[AdapterRef]) -> list[FileResult]:
    bundle = _bundle(spec, run)
    known = _known(ledger, run)
    return _classify(refs, bundle, spec, known)


@lru_cache(maxsize=1)
def _bundle(spec: ScanSpec, _run: str) -> Bundle | ShippedReader | None:
    """Read once by every process of a run."""
    return spec.bundle()


@lru_cache(maxsize=1)
def _known(ledger: Path, _run: str) -> dict[str, int]:
    """Read what was known before the run."""
    return read_starts(ledger)
