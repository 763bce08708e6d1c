"""Find adapters that do the same, or nearly: what `lora-ws similar` and `dedup` do, for Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_ws.adapters import read_adapter
from lora_ws.audit.dedup import Copies, copies
from lora_ws.audit.scan import ScanSpec, library
from lora_ws.audit.similar import (
    EQUAL,
    NEAR,
    Index,
    Match,
    adapter_modules,
    is_partial,
    marked_hash,
    same_update,
    signature,
)
from lora_ws.report.progress import progress


@dataclass(frozen=True)
class SimilarSpec:
    """Where to look for adapters like a given one, and how the command shows them.

    Attributes:
        index: known adapters: a folder, a .txt list, a name on the Hub, or the folder of an index
        top: number of adapters to show.
        workers: processes that read files.
        cache: folder of cached findings; null takes scan/ in the user's cache.
        as_json: print one JSON object per line instead of a table.
    """

    index: str
    top: int = 10
    workers: int = 1
    cache: Path | None = None
    as_json: bool = False


@dataclass(frozen=True)
class DedupSpec:
    """When adapters are copies of each other, and how the command shows them.

    Attributes:
        equal: minimal cosine of updates that count as equal but for rounding.
        near: minimal cosine of updates that count as nearly equal.
        workers: processes that read files.
        cache: folder of cached findings; null takes scan/ in the user's cache.
        as_json: print one JSON object per line instead of text.
    """

    equal: float = EQUAL
    near: float = NEAR
    workers: int = 1
    cache: Path | None = None
    as_json: bool = False


class Similar(NamedTuple):
    """A known adapter beside the one that was asked about.

    Attributes:
        match: the known adapter, and the cosine of the two updates.
        likeness: whether the updates are the same but for rounding, or near.
    """

    match: Match
    likeness: Literal["the same", "near", ""]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields of the match, and ``likeness``."""
        return {**self.match._asdict(), "likeness": self.likeness}


def find_similar(file: str, spec: SimilarSpec) -> list[Similar]:
    """Find the adapters whose updates are most like that of one file, the most like first.

    Args:
        file: a .safetensors file, a PEFT folder, or hub:owner/name/file.safetensors
        spec: where to look.

    Raises:
        AdapterError: the file cannot be read.
        ConfigError: there is nothing to compare with.
    """
    adapter = read_adapter(file)
    asked = signature(adapter_modules(adapter))
    asked = asked._replace(hash=marked_hash(adapter, asked.hash))
    matches = _known([spec.index], spec).query(asked.sketch, spec.top)
    return [Similar(match, _likeness(match, asked.hash, asked.norm)) for match in matches]


def find_copies(what: Sequence[str], spec: DedupSpec = DedupSpec()) -> tuple[Index, Copies]:
    """Group adapters whose updates are the same, and those whose are nearly.

    Args:
        what: files, folders, .txt lists, names on the Hub, or a folder of an index
        spec: what counts as the same.

    Returns:
        The signatures of all adapters, and the groups of at least two.

    Raises:
        ConfigError: none of the files could be read, or the cosines are out of order.
    """
    known = _known(what, spec)
    return known, copies(known, spec.equal, spec.near)


def _known(what: Sequence[str], spec: SimilarSpec | DedupSpec) -> Index:
    with progress("read", None) as advance:
        return library(what, ScanSpec(workers=spec.workers, cache=spec.cache), advance)


def _likeness(match: Match, update_hash: str, norm: float) -> Literal["the same", "near", ""]:
    whole = not (is_partial(match.hash) or is_partial(update_hash))
    if match.hash == update_hash or (whole and same_update(match.cosine, match.norm, norm)):
        return "the same"
    return "near" if match.cosine >= NEAR else ""
