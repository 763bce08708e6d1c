"""Findings by content, on disk: what makes a scan go on after a kill, and cheap to repeat.

``settings.json`` says what judged, ``findings.jsonl`` holds a line a content, ``signatures/`` an
`Index` by the same keys. Signatures are written first, so that a finding that counts has its own.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_ws import journal
from lora_ws.audit import index_store
from lora_ws.audit.classify import PASSING, FileResult, Finding
from lora_ws.audit.index_store import Signature
from lora_ws.audit.similar import Index
from lora_ws.errors import DataError
from lora_ws.functional.sketch import SIDE

# How a line starts, so that keys are read without the rest.
START, KEY_LENGTH = b'{"key": "', 64
SETTINGS, FINDINGS, SIGNATURES = "settings.json", "findings.jsonl", "signatures"
# What makes findings, beside the bundle: folders of the package, and a table of modules' names.
MAKERS = ("adapters", "audit", "bundle", "featurizers", "functional", "models")
TABLE = "_assets/modules.json"
PACKAGE = Path(__file__).parents[1]


@lru_cache(maxsize=1)
def code_hash(root: Path = PACKAGE) -> str:
    """Hash the code that makes findings: what it found is not kept for other code.

    Args:
        root: folder of this package.

    Example:
        >>> len(code_hash())
        64
    """
    sources = sorted(file for folder in MAKERS for file in (root / folder).rglob("*.py"))
    hashes = [hashlib.sha256(file.read_bytes()).digest() for file in (*sources, root / TABLE)]
    return hashlib.sha256(b"".join(hashes)).hexdigest()


@dataclass(eq=False)
class Ledger:
    """The findings of one way to judge.

    Attributes:
        folder: of its files.
        starts: where in the file the line of each key starts.
        signed: keys whose signatures are kept.
    """

    folder: Path
    starts: dict[str, int] = field(default_factory=dict)
    signed: set[str] = field(default_factory=set)

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, settings: dict[str, Any]) -> Iterator["Ledger"]:
        """Open for adding, and keep others away; what a kill cut short is removed.

        Args:
            folder: absent, or of a ledger.
            settings: what judges; written down for people.

        Raises:
            DataError: another process writes to it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        with index_store.writing(folder):
            found = cls(folder)
            found._read()
            yield found

    def add(self, batch: Sequence[FileResult]) -> None:
        """Keep what can be kept: findings of contents that have a key and will not change."""
        new = {
            one.key: one
            for one in batch
            if one.key and one.finding and one.finding.reason not in PASSING
        }
        new = {key: one for key, one in new.items() if key not in self.starts}
        signatures = {
            key: one.signature
            for key, one in new.items()
            if one.signature and key not in self.signed
        }
        self._sign(signatures)
        found = {key: one.finding.to_dict() for key, one in new.items() if one.finding}
        lines = [{"key": key, "finding": finding} for key, finding in found.items()]
        starts = journal.append(self.folder / FINDINGS, lines)
        self.starts |= zip(found, starts, strict=True)

    def get(self, key: str) -> Finding:
        """The finding of a content; its `file` is what it was called when it was first seen.

        Raises:
            DataError: its line is damaged.
        """
        with (self.folder / FINDINGS).open("rb") as file:
            file.seek(self.starts[key])
            line = file.readline()
        try:
            return Finding.from_dict(json.loads(line, parse_constant=_refuse)["finding"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.folder}: {FINDINGS} is damaged at byte {self.starts[key]} ({error}); "
                "remove the folder and scan again"
            ) from error

    def holds(self, key: str) -> bool:
        """Whether a finding is kept and can be read; a damaged one is dropped, to be made anew."""
        if key not in self.starts:
            return False
        try:
            self.get(key)
        except DataError:
            del self.starts[key]
            return False
        return True

    def index(self) -> Index:
        """The signatures, named by keys."""
        return Index.open(self.folder / SIGNATURES)

    def _sign(self, signatures: dict[str, Signature]) -> None:
        names = list(signatures)
        index_store.append(self.folder / SIGNATURES, SIDE, names, list(signatures.values()))
        self.signed |= set(names)

    def _read(self) -> None:
        index = Index.build(self.folder / SIGNATURES)
        self.signed = set(index.rows["name"].to_pylist())
        journal.mend(self.folder / FINDINGS)
        self.starts = read_starts(self.folder)


def _refuse(constant: str) -> Any:
    """What is no number is no JSON either."""
    raise ValueError(f"it holds {constant}")


def read_starts(folder: Path) -> dict[str, int]:
    """Where the line of each key starts; of a line that a kill cut short, nothing.

    Args:
        folder: of a ledger, which another process may be writing.
    """
    key = slice(len(START), len(START) + KEY_LENGTH)
    return {line[key].decode(): start for start, line in journal.lines(folder / FINDINGS)}
