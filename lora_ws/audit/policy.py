"""What a platform wants flagged: lists, classes, bases, likenesses. Data, read from YAML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lora_ws.adapters.bases import may_be
from lora_ws.audit.classify import Finding
from lora_ws.audit.index_store import HASH_LENGTH
from lora_ws.audit.scan import Scan
from lora_ws.audit.similar import Index, Match
from lora_ws.config import nearest
from lora_ws.errors import REASONS, ConfigError

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Policy:
    """Which files are flagged; one on the allow list never is.

    Attributes:
        deny: hashes of files that are flagged: of the effective update, which finds a file in any
            spelling, or the sha256 of its bytes.
        allow: hashes of files that are not flagged, whatever else holds; of a file that is read in
            part (``partly_read``) the sha256 alone counts.
        classes: class -> least calibrated probability at which a file is flagged, unless the
            classifier abstains from it.
        bases: base models that are expected; files that can be of none of them are flagged. Empty
            expects all.
        refused: flag what could not be read: all of it, none, or what was refused for one of these
            reasons (`lora_ws.errors.REASONS`).
        abstained: flag what the classifier abstained from.
        oddities: flag what honest trainers do not write: modules of two base models, or of none
            that is known.
        partly_read: flag a file that holds tensors which no update, hash or verdict covers.
        similar: flag a file whose cosine with a known adapter (``--index``) is at least this; None
            does not.

    Example:
        >>> Policy(classes={"reptile": 0.8}).refused
        True
    """

    deny: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    classes: dict[str, float] = field(default_factory=dict)
    bases: tuple[str, ...] = ()
    refused: bool | tuple[str, ...] = True
    abstained: bool = False
    oddities: bool = True
    partly_read: bool = False
    similar: float | None = None

    def __post_init__(self) -> None:
        for name in ("deny", "allow"):
            for entry in getattr(self, name):
                if len(entry) != HASH_LENGTH or not set(entry) <= set("0123456789abcdef"):
                    raise ConfigError(
                        f"{name}: expected a hash of {HASH_LENGTH} hexadecimal digits, as `lora-ws "
                        f"scan --json` writes `update_hash` and `sha256`, got `{entry[:80]}`"
                    )
        named = () if isinstance(self.refused, bool) else self.refused
        if unknown := [name for name in named if name not in REASONS]:
            raise ConfigError(
                f"refused: expected true, false or a list of reasons, got `{unknown[0][:80]}`"
                + nearest(unknown[0], list(REASONS))
            )
        if both := sorted(self._denied & self._allowed):
            raise ConfigError(f"`{both[0]}` is on the deny list and on the allow list; choose one")
        shares = {**self.classes, **({} if self.similar is None else {"similar": self.similar})}
        for name, least in shares.items():
            if not 0 <= least <= 1:
                raise ConfigError(f"{name}: expected a number from 0 to 1, got {least:g}")

    def flags(self, finding: Finding, nearest: Sequence[Match] = ()) -> tuple[str, ...]:
        """Why a file is flagged; empty where it is not.

        Args:
            finding: of the file.
            nearest: known adapters, the most like one first.
        """
        hashes = {finding.update_hash, finding.sha256} - {""}
        known = {finding.sha256} if finding.partly_read else hashes
        if known & self._allowed:
            return ()
        found = ["on the deny list"] if hashes & self._denied else []
        if finding.reason and (self.refused is True or finding.reason in (self.refused or ())):
            found.append(f"refused: {finding.reason}")
        if finding.facts and self.bases and not may_be(finding.facts.base, self.bases):
            found.append(f"base: {finding.facts.base}")
        if finding.facts and self.oddities:
            found += [f"odd: {oddity}" for oddity in finding.facts.oddities]
        if finding.facts and self.partly_read and finding.partly_read:
            found.append(f"partly read: {finding.facts.tensors_unread} tensors are not")
        if verdict := finding.verdict:
            found += [
                f"class: {name} {verdict.probabilities[name]:.2f}"
                for name, least in self.classes.items()
                if not verdict.reason and verdict.probabilities[name] >= least
            ]
            if self.abstained and verdict.reason:
                found.append(f"abstained: {verdict.reason}")
        if nearest and self.similar is not None and nearest[0].cosine >= self.similar:
            found.append(f"similar: {nearest[0].name} {nearest[0].cosine:.3f}")
        return tuple(found)

    def check(self, classes: Sequence[str], known: bool) -> None:
        """Refuse rules that can never apply.

        Args:
            classes: of the classifier; none without one.
            known: whether there are known adapters to compare with.

        Raises:
            ConfigError: a class that the classifier does not have, or a likeness to nothing.
        """
        if unknown := [name for name in self.classes if name not in classes]:
            has = f"it has {', '.join(classes)}" if classes else "there is no --model"
            raise ConfigError(f"policy: no class `{unknown[0]}` in the classifier: {has}")
        if self.similar is not None and not known:
            raise ConfigError("policy: `similar` needs --index, the adapters to compare with")

    @cached_property
    def _denied(self) -> frozenset[str]:
        return frozenset(self.deny)

    @cached_property
    def _allowed(self) -> frozenset[str]:
        return frozenset(self.allow)


class Reviewed(NamedTuple):
    """A file, why it is flagged, and the known adapters most like it."""

    finding: Finding
    flags: tuple[str, ...] = ()
    nearest: tuple[Match, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields of the finding, ``flags`` and ``nearest``."""
        nearest = [match._asdict() for match in self.nearest]
        return {**self.finding.to_dict(), "flags": list(self.flags), "nearest": nearest}


def review(
    scan: Scan, policy: Policy, known: Index | None = None, top: int = 3
) -> Iterator[Reviewed]:
    """Apply a policy to every file of a scan.

    Args:
        scan: the files.
        policy: what is flagged.
        known: adapters to compare with.
        top: how many of these to name for each file.
    """
    own = scan.ledger.index()
    at = {key: row for row, key in enumerate(own.rows["name"].to_pylist())}
    for start in range(0, len(scan), _ROWS_AT_ONCE):
        rows = range(start, min(start + _ROWS_AT_ONCE, len(scan)))
        signed = [row for row in rows if scan.keys[row] in at] if known else []
        nearest: dict[int, tuple[Match, ...]] = {}
        if known and signed:
            sketches = own.sketches[[at[scan.keys[row]] for row in signed]]
            found = known.matches(known.search(np.asarray(sketches), top))
            nearest = dict(zip(signed, map(tuple, found), strict=True))
        for row in rows:
            finding, near = scan[row], nearest.get(row, ())
            yield Reviewed(finding, policy.flags(finding, near), near)
