"""One batch of adapter files in, one finding a file out: the stage that every scan is made of.

A pure function of the files' bytes and the classifier; nothing that a file holds ends it.
"""

import hashlib
import json
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lora_ws.adapters import Adapter, AdapterFile, AdapterRef
from lora_ws.adapters.bases import may_be
from lora_ws.adapters.header import LIMITS, Limits
from lora_ws.adapters.projection import Projection, project_adapter
from lora_ws.adapters.source import Source
from lora_ws.adapters.summary import AdapterSummary, summarize
from lora_ws.audit.index_store import Signature
from lora_ws.audit.similar import adapter_modules, marked_hash
from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import Prediction
from lora_ws.bundle.evidence import layer_evidence
from lora_ws.bundle.shipped import ShippedReader, loaded
from lora_ws.errors import AdapterError, LoraWsError, NotAvailableError, printable
from lora_ws.functional.measure import Measured, measure

NO_MODEL = "content: no detector for this base, as no model was given"
NO_UPDATE = "content: the update is zero in the layers that the model reads"
# Old name of a key of findings -> its name.
RENAMED = {
    "silence": "no_prediction_reason",
    "energy": "retained_energy",
    "missing": "layers_missing",
    "beyond": "modules_ignored",
}
# Reasons that may be gone when a file is read again.
PASSING = ("missing", "unreadable", "remote", "failed")
# Numbers of factors that are held to be measured together: 32 MiB, or one file.
TOGETHER = 1 << 23


@dataclass(frozen=True)
class Finding:
    """What is known of one file: plain data, one line of JSON.

    Attributes:
        file: what the user calls it.
        sha256: of its bytes; empty where they were not read whole and no source reported it.
        revision: Hub commit, or empty.
        reason: why it could not be read, a key of `REASONS`; empty where it could.
        message: the same in words.
        facts: base, method, ranks, scales, norms; None of a file that could not be read.
        update_hash: of the effective update (`update_hash`); empty where parts were read.
        partly_read: whether the file holds tensors that are in no update: two such files may have
            one ``update_hash`` and do different things.
        verdict: of the classifier; None where it has none for this file.
        no_prediction_reason: why there is no verdict.
        retained_energy: share of the update, in the layers judged, that fits the classifier's
            ranks.
        layers_missing: how many layers the classifier reads and the file does not adapt.
        modules_ignored: how many modules of the file were not judged, or not wholly.
        evidence: layer -> what it adds to the verdict (`layer_evidence`); where it was asked for.
        bytes_read: of the file.
    """

    file: str
    sha256: str = ""
    revision: str = ""
    reason: str = ""
    message: str = ""
    facts: AdapterSummary | None = None
    update_hash: str = ""
    verdict: Prediction | None = None
    no_prediction_reason: str = ""
    retained_energy: float | None = None
    layers_missing: int = 0
    modules_ignored: int = 0
    evidence: dict[str, float] | None = None
    bytes_read: int = 0
    partly_read: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; for one release also under the old names of keys, `RENAMED`."""
        plain = {**vars(self), "facts": self.facts and self.facts.to_dict()}
        plain["verdict"] = self.verdict and self.verdict.to_dict()
        return plain | {old: plain[new] for old, new in RENAMED.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Finding":
        """Inverse of `to_dict`, also after JSON, and of what was written before `RENAMED`."""
        data = {**{RENAMED.get(key, key): value for key, value in data.items()}, **data}
        data = {key: value for key, value in data.items() if key not in RENAMED}
        facts, verdict = data["facts"], data["verdict"]
        if facts is not None:
            facts = AdapterSummary.from_dict(facts)
        if verdict is not None:
            verdict = Prediction.from_dict(verdict)
        return cls(**{**data, "facts": facts, "verdict": verdict})


class FileResult(NamedTuple):
    """What came of one file.

    Attributes:
        key: names its content; empty where that is unknown.
        finding: None where the key is among those known.
        signature: finds the file's likes again; None where it was not read whole.
    """

    key: str
    finding: Finding | None
    signature: Signature | None = None


class _Read(NamedTuple):
    """A file before the classifier has seen it."""

    judged: FileResult
    row: Projection | None = None


class _Opened(NamedTuple):
    """A file whose weights were read, but not measured.

    Attributes:
        ref: as the user calls it.
        key: names its content.
        file: its header.
        adapter: its weights; None where the header alone was read.
        whole: whether these are all.
        why_not: why the classifier makes no prediction; empty where it does.
        bundle: the classifier; None where it makes none.
        row: the weights in the classifier's layout.
    """

    ref: AdapterRef
    key: str
    file: AdapterFile
    adapter: Adapter | None
    whole: bool
    why_not: str
    bundle: Bundle | None
    row: Projection | None


def classify_files(
    refs: Sequence[AdapterRef],
    bundle: Bundle | ShippedReader | None = None,
    *,
    whole: bool | None = None,
    evidence: bool = False,
    hashes: bool = True,
    known: Container[str] = (),
    limits: Limits = LIMITS,
) -> list[FileResult]:
    """Read a batch of files and classify what can be classified.

    Args:
        refs: files; a batch holds one row of the classifier's layout for each of them.
        bundle: the classifier; None reports facts of files alone. A `ShippedReader` is
            loaded at the first file of its base, and has all files read whole, as without one.
        whole: read all of a file, for its norms and signature; else, with a classifier, the layers
            that it needs, and of files of another base the header alone. None reads files on this
            machine whole and those elsewhere in parts.
        evidence: measure what each layer adds to a verdict: as many classifications as layers.
        hashes: report the `update_hash` of what is read whole.
        known: keys of contents that need not be read again.
        limits: on what a file may be.

    Returns:
        One result per file, in their order. Whatever is wrong with a file stands in its finding.
    """
    opened = (_open(ref, bundle, whole, known, limits) for ref in refs)
    read = list(_described(opened, hashes))
    judged = [found.judged for found in read]
    found = [(k, one.row, one.judged.finding) for k, one in enumerate(read)]
    rows = [(k, row, finding) for k, row, finding in found if row and finding]
    if bundle is None or not rows:
        return judged
    bundle = loaded(bundle)
    for layout in dict.fromkeys(row.layout for _, row, _ in rows):
        same = [found for found in rows if found[1].layout == layout]
        weights = np.stack([row.weights for _, row, _ in same])
        projected = [not row.exact for _, row, _ in same]
        verdicts = bundle.predict_batch(weights, layout, projected=projected)
        for (k, row, finding), verdict in zip(same, verdicts, strict=True):
            if not math.isfinite(verdict.confidence):
                why = f"{refs[k].name}: its values are too large for the model to compute with"
                finding = replace(finding, facts=None, reason="not-finite", message=printable(why))
                judged[k] = FileResult(judged[k].key, finding)
                continue
            told = evidence and verdict.label
            shown = layer_evidence(bundle, row.weights, layout) if told else None
            finding = replace(finding, verdict=verdict, evidence=shown)
            judged[k] = judged[k]._replace(finding=finding)
    return judged


def _open(
    ref: AdapterRef,
    reader: Bundle | ShippedReader | None,
    whole: bool | None,
    known: Container[str],
    limits: Limits,
) -> _Opened | _Read:
    key, source = "", None
    with ExitStack() as opened:
        try:
            source, config = ref.open()
            opened.enter_context(source)
            if whole is None:
                whole = ref.path is not None
            whole = whole or not isinstance(reader, Bundle)
            key = _key(source, config, whole)
            if key in known:
                return _Read(FileResult(key, None))
            file = AdapterFile.of(source, config, limits)
            return _weights(ref, key, file, reader, whole)
        # Whatever a file makes of the reader, the others are judged all the same.
        except Exception as error:
            return _Read(FileResult(key, refused(ref, *_why(error), source)))


def _why(error: Exception) -> tuple[str, str]:
    """The reason of an error, a key of `REASONS`, and its words."""
    if isinstance(error, AdapterError):
        return error.reason, str(error)
    if isinstance(error, NotAvailableError):
        return "remote", str(error)
    if isinstance(error, LoraWsError):
        return "unreadable", str(error)
    return "failed", f"{type(error).__name__}: {error}"


def _described(opened: Iterable[_Opened | _Read], hashes: bool) -> Iterator[_Read]:
    """Describe files in their order, as many together as may be held."""
    # Once as much was freed, glibc keeps what it gets back: without, every file's memory is mapped
    # and zeroed anew. Never touched, this takes none.
    np.empty(4 * TOGETHER - (1 << 16), np.uint8)
    held: list[_Opened | _Read] = []
    numbers = 0
    for one in opened:
        held.append(one)
        if isinstance(one, _Opened):
            numbers += one.file.structure.numbers
        if numbers >= TOGETHER:
            yield from _describe(held, hashes)
            held, numbers = [], 0
    yield from _describe(held, hashes)


def _describe(held: Sequence[_Opened | _Read], hashes: bool) -> list[_Read]:
    """Describe files, those that were read whole together."""
    try:
        return _measured(held, hashes)
    except Exception as error:
        if len(held) == 1 and isinstance(one := held[0], _Opened):
            finding = refused(one.ref, *_why(error), one.file.source)
            return [_Read(FileResult(one.key, finding))]
        # One of them is to blame.
        return [read for one in held for read in _describe([one], hashes)]


def _measured(held: Sequence[_Opened | _Read], hashes: bool) -> list[_Read]:
    opened = [one for one in held if isinstance(one, _Opened) and one.whole]
    modules = [adapter_modules(one.adapter) for one in opened if one.adapter]
    found = dict(zip(map(id, opened), measure(modules, hashes=hashes), strict=True))
    return [one if isinstance(one, _Read) else _finding(one, found.get(id(one))) for one in held]


def refused(ref: AdapterRef, reason: str, why: str, source: Source | None = None) -> Finding:
    """The finding of a file that could not be read.

    Args:
        ref: the file.
        reason: a key of `REASONS`.
        why: in words.
        source: its bytes, where it could be opened.
    """
    message = why if printable(ref.name) in why else printable(f"{ref.name}: {why}")
    # A source that cannot be reached has no hash and no revision either.
    if source is None or reason in PASSING:
        return Finding(ref.name, reason=reason, message=message)
    return Finding(
        *(ref.name, source.sha256 or "", source.revision, reason, message),
        bytes_read=source.bytes_read,
    )


def _key(source: Source, config: str | None, whole: bool) -> str:
    """Hash of the weights, of the settings that say how to read them, and of how much is read."""
    if not source.identity:
        return ""
    return hashlib.sha256(json.dumps([source.identity, config, whole]).encode()).hexdigest()


def _weights(
    ref: AdapterRef,
    key: str,
    file: AdapterFile,
    reader: Bundle | ShippedReader | None,
    whole: bool,
) -> _Opened:
    why_not = NO_MODEL if reader is None else _foreign(file, reader)
    adapter, row = file.read() if whole else None, None
    bundle = None if reader is None or why_not else loaded(reader)
    if bundle is not None:
        try:
            adapter = adapter or file.read(bundle.layers)
            row = project_adapter(adapter, bundle.layout_for(adapter), bundle.layers)
        except AdapterError as error:
            if error.reason != "foreign":
                raise
            why_not = str(error)
    return _Opened(ref, key, file, adapter, whole, why_not, bundle, row)


def _finding(one: _Opened, measured: Measured | None) -> _Read:
    file, bundle, row, why_not = one.file, one.bundle, one.row, one.why_not
    facts = summarize(file, one.adapter, measured and measured.norms)
    if bundle is not None and row and not any(map(facts.norms.get, bundle.layers)):
        row, why_not = None, NO_UPDATE
    signature = None
    if one.adapter and measured:
        marked = marked_hash(one.adapter, measured.hash)
        signature = Signature(measured.sketch, facts.norm, marked)
    judged = len(bundle.layers) - len(row.missing) if bundle and row else 0
    ignored = sum(facts.modules.values()) - judged + file.structure.modules_unread
    finding = Finding(
        file=one.ref.name,
        sha256=file.source.sha256 or "",
        revision=file.source.revision,
        facts=facts,
        update_hash=measured.hash if measured else "",
        no_prediction_reason=why_not,
        retained_energy=row.energy if row else None,
        layers_missing=len(row.missing) if row else 0,
        modules_ignored=ignored if row else 0,
        bytes_read=file.bytes_read,
        partly_read=bool(file.structure.unread),
    )
    return _Read(FileResult(one.key, finding, signature), row)


def _foreign(file: AdapterFile, reader: Bundle | ShippedReader) -> str:
    """Why the classifier makes no prediction; empty where it does."""
    # Without a layer that reads text, SD1.x and SD2.x look alike.
    if may_be(file.base.name, [reader.base]):
        return ""
    which = "shipped model" if isinstance(reader, ShippedReader) else "model"
    # What shows the base is among the facts: files of one base have one reason.
    told = f"it is {file.base.name}, the {which} reads {reader.base}"
    return f"content: no detector for this base: {told}"
