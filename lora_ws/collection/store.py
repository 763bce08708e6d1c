"""Write a store in streaming fashion so that a kill loses nothing and doubles nothing.

Rows are appended in batches to ``<store>.partial``. A batch counts once its line stands in
``journal.jsonl``; whatever was written after the last line is cut off when the writer opens again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from jaxtyping import Float

from lora_ws.adapters.layout import Layout
from lora_ws.collection.adapter_set import CARD, LAYOUT, MANIFEST, ROWS, WEIGHTS, _partial
from lora_ws.collection.card import DatasetCard
from lora_ws.config import dump_yaml
from lora_ws.errors import DataError

QUARANTINE = "quarantine.jsonl"
JOURNAL = "journal.jsonl"
HEADER_BYTES = 128


class StoreWriter:
    """Appends rows to a store under construction; use as a context manager.

    Args:
        path: the store to make; must not exist.
        layout: columns of the weights.
        card: written beside them.
        origin: what the rows come from; an unfinished store is continued only if it is equal.
    """

    def __init__(
        self, path: Path, layout: Layout, card: DatasetCard, origin: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.card = card
        self.origin = dict(origin)
        self.rows = 0
        self.batches = 0
        self.quarantine: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        if self.path.exists():
            raise DataError(f"{self.path} exists already; choose another place or remove it")
        self._dir = _partial(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(self.path) + ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise DataError(f"{self.path} is being written by another process") from error
        try:
            self._resume()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._weights.close()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def append(
        self,
        weights: Float[np.ndarray, "rows params"],
        rows: pa.Table,
        quarantine: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Add a batch of rows for good: after this returns, a kill cannot lose it."""
        if rows.num_rows != len(weights) or weights.shape[1] != self.layout.size:
            raise DataError(
                f"expected [{rows.num_rows}, {self.layout.size}] weights for {rows.num_rows} table "
                f"rows, got {list(weights.shape)}"
            )
        np.ascontiguousarray(weights, "<f4").tofile(self._weights)
        self._weights.flush()
        os.fsync(self._weights.fileno())
        if rows.num_rows:
            pq.write_table(rows, self._part(self.batches))
        line = {"rows": rows.num_rows, "quarantine": list(quarantine)}
        with (self._dir / JOURNAL).open("a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._count(line)

    def finish(self) -> None:
        """Close the store: all its files appear under the final name at once."""
        table = self.table()
        self._weights.seek(0)
        self._weights.write(_npy_header(self.rows, self.layout.size))
        self._weights.flush()
        os.fsync(self._weights.fileno())
        pq.write_table(table, self._dir / ROWS)
        (self._dir / LAYOUT).write_text(json.dumps(self.layout.to_dict()))
        dump_yaml(self.card, self._dir / CARD)
        if self.quarantine:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.quarantine)
            (self._dir / QUARANTINE).write_text(lines)
        manifest = {
            "rows": self.rows,
            "quarantined": len(self.quarantine),
            "fingerprint": self.layout.fingerprint,
            "sha256": content_hash(table),
            **self.origin,
        }
        (self._dir / MANIFEST).write_text(json.dumps(manifest, indent=1))
        self._dir.rename(self.path)
        # Last, so that a kill before the renaming leaves an import that can be continued.
        shutil.rmtree(self.path / "rows")
        (self.path / JOURNAL).unlink()

    def table(self) -> pa.Table:
        """The table rows committed so far."""
        parts = [pq.read_table(p) for k in range(self.batches) if (p := self._part(k)).exists()]
        if not parts:
            raise DataError(f"{self.path}: no row could be imported; nothing was stored")
        return pa.concat_tables(parts, promote_options="permissive")

    def _part(self, batch: int) -> Path:
        return self._dir / "rows" / f"{batch:06d}.parquet"

    def _count(self, line: Mapping[str, Any]) -> None:
        self.rows += line["rows"]
        self.quarantine += line["quarantine"]
        self.batches += 1

    def _resume(self) -> None:
        """Start anew, or continue behind the last committed batch."""
        journal = self._dir / JOURNAL
        head = {"origin": self.origin, "fingerprint": self.layout.fingerprint}
        lines = _complete_lines(journal) if journal.exists() else []
        if lines and json.loads(lines[0]) != head:
            raise DataError(
                f"{self._dir} holds an unfinished import of something else (other files, options "
                "or layout); remove it, or choose another place"
            )
        if not lines:
            shutil.rmtree(self._dir, ignore_errors=True)
            (self._dir / "rows").mkdir(parents=True)
            (self._dir / WEIGHTS).write_bytes(b"\0" * HEADER_BYTES)
            lines = [json.dumps(head) + "\n"]
        for line in lines[1:]:
            self._count(json.loads(line))
        journal.write_text("".join(lines))
        self._weights = (self._dir / WEIGHTS).open("r+b")
        self._weights.truncate(HEADER_BYTES + 4 * self.layout.size * self.rows)
        self._weights.seek(0, os.SEEK_END)


def content_hash(table: pa.Table) -> str:
    """One hash over the content hashes of the rows, in order."""
    digest = hashlib.sha256()
    hashes = table["sha256"].to_pylist() if "sha256" in table.column_names else table.to_pylist()
    for value in hashes:
        digest.update(str(value).encode())
    return digest.hexdigest()


def _complete_lines(journal: Path) -> list[str]:
    lines = journal.read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _npy_header(rows: int, columns: int) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    length = HEADER_BYTES - 10
    text = header.ljust(length - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.encode("latin1")
