"""One batch of adapter files in, one finding a file out: the stage that every scan is made of.

A pure function of the files' bytes and the classifier; nothing that a file holds ends it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lora_ws.adapters import Adapter, AdapterFile, Place, open_adapter
from lora_ws.adapters.facts import Facts, describe
from lora_ws.adapters.projection import Projection, project
from lora_ws.audit.folder import Signature
from lora_ws.audit.modules import adapter_modules
from lora_ws.errors import AdapterError, LoraWsError, NotAvailableError
from lora_ws.functional.sketch import sketch, update_hash
from lora_ws.learn.bundle import Bundle
from lora_ws.learn.confidence import Verdict
from lora_ws.learn.evidence import layer_evidence

NO_MODEL = "no model was given"


@dataclass(frozen=True)
class Finding:
    """What is known of one file: plain data, one line of JSON.

    Attributes:
        file: what the user calls it.
        sha256: of its bytes; empty where they were not read whole and nobody announced it.
        revision: Hub commit, or empty.
        reason: why it could not be read, a key of `REASONS`; empty where it could.
        message: the same in words.
        facts: base, method, ranks, scales, norms; None of a file that could not be read.
        update_hash: of the effective update (`update_hash`); empty where parts were read.
        verdict: of the classifier; None where it has none for this file.
        silence: why there is no verdict.
        energy: share of the update, in the layers judged, that fits the classifier's ranks.
        missing: layers that the classifier reads and the file does not adapt.
        beyond: modules of the file that were not judged.
        evidence: layer -> what it adds to the verdict (`layer_evidence`); where it was asked for.
        bytes_read: of the file.
    """

    file: str
    sha256: str = ""
    revision: str = ""
    reason: str = ""
    message: str = ""
    facts: Facts | None = None
    update_hash: str = ""
    verdict: Verdict | None = None
    silence: str = ""
    energy: float | None = None
    missing: int = 0
    beyond: int = 0
    evidence: dict[str, float] | None = None
    bytes_read: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Finding":
        """Inverse of `to_dict`, also after JSON."""
        facts, verdict = data["facts"], data["verdict"]
        if facts is not None:
            facts = Facts(**{**facts, "odd": tuple(facts["odd"])})
        if verdict is not None:
            verdict = Verdict(**{**verdict, "conformal_set": tuple(verdict["conformal_set"])})
        return cls(**{**data, "facts": facts, "verdict": verdict})


class Judged(NamedTuple):
    """A finding, and what finds the file's likes again; None where it was not read whole."""

    finding: Finding
    signature: Signature | None


class _Read(NamedTuple):
    """A file before the classifier has seen it."""

    judged: Judged
    row: Projection | None = None


def judge(
    places: Sequence[Place],
    bundle: Bundle | None = None,
    *,
    whole: bool = True,
    evidence: bool = False,
) -> list[Judged]:
    """Read a batch of files and classify what can be classified.

    Args:
        places: files; a batch holds one row of the classifier's layout for each of them.
        bundle: the classifier; None tells of files alone.
        whole: read all of a file, for its hash, norms and signature; else, with a classifier, the
            layers that it needs, and of files of another base the header alone.
        evidence: say what each layer adds to a verdict: as many classifications as layers.

    Returns:
        One a place, in their order. Whatever is wrong with a file stands in its finding.
    """
    read = [_read(place, bundle, whole) for place in places]
    at = [k for k, found in enumerate(read) if found.row is not None]
    judged = [found.judged for found in read]
    if bundle is None or not at:
        return judged
    rows = [found.row for found in read if found.row is not None]
    weights = np.stack([row.weights for row in rows])
    verdicts = bundle.verdict(weights, projected=[not row.exact for row in rows])
    for k, row, verdict in zip(at, rows, verdicts, strict=True):
        shown = layer_evidence(bundle, row.weights) if evidence and verdict.label else None
        finding = replace(judged[k].finding, verdict=verdict, evidence=shown)
        judged[k] = judged[k]._replace(finding=finding)
    return judged


def _read(place: Place, bundle: Bundle | None, whole: bool) -> _Read:
    try:
        return _examine(place, open_adapter(place), bundle, whole)
    except AdapterError as error:
        return _refused(place, error.reason, error)
    except NotAvailableError as error:
        return _refused(place, "remote", error)
    except LoraWsError as error:
        return _refused(place, "unreadable", error)
    # Whatever a file makes of the reader, the others are judged all the same.
    except Exception as error:
        return _refused(place, "failed", f"{place.name}: {type(error).__name__}: {error}")


def _refused(place: Place, reason: str, error: object) -> _Read:
    text = str(error)
    message = text if place.name in text else f"{place.name}: {text}"
    return _Read(Judged(Finding(place.name, reason=reason, message=message), None))


def _examine(place: Place, file: AdapterFile, bundle: Bundle | None, whole: bool) -> _Read:
    silence = NO_MODEL if bundle is None else _foreign(file, bundle)
    adapter, row = None, None
    if whole or bundle is None:
        adapter = file.read()
    if bundle is not None and not silence:
        try:
            adapter = adapter or file.read(bundle.layers)
            row = project(adapter, bundle.layout, bundle.layers)
        except AdapterError as error:
            if error.reason != "foreign":
                raise
            silence = str(error)
    facts = describe(file, adapter)
    signature = _signature(adapter, facts.norm) if adapter and (whole or bundle is None) else None
    modules = sum(facts.modules.values())
    judged = len(bundle.layers) - len(row.missing) if bundle and row else 0
    finding = Finding(
        file=place.name,
        sha256=file.source.sha256 or "",
        revision=file.source.revision,
        facts=facts,
        update_hash=signature.hash if signature else "",
        silence=silence,
        energy=row.energy if row else None,
        missing=len(row.missing) if row else 0,
        beyond=modules - judged if row else 0,
        bytes_read=file.moved,
    )
    return _Read(Judged(finding, signature), row)


def _foreign(file: AdapterFile, bundle: Bundle) -> str:
    """Why the classifier has nothing to say; empty where it may."""
    # Without a layer that reads text, SD1.x and SD2.x look alike.
    if bundle.base in file.base.name and not file.base.name.startswith("text encoder"):
        return ""
    return (
        f"content: no detector for this base: it is {file.base.name} ({file.base.evidence}), the "
        f"model reads {bundle.base}"
    )


def _signature(adapter: Adapter, norm: float) -> Signature:
    modules = list(adapter_modules(adapter))
    return Signature(sketch(modules), norm, update_hash(modules))
