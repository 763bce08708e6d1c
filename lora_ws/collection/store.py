"""Write a store in streaming fashion so that a kill loses nothing and doubles nothing.

Rows are appended in batches to ``<store>.partial``. A batch counts once its line stands in
``journal.jsonl``; whatever was written after the last line is cut off when the writer opens again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from lora_ws import journal
from lora_ws.adapters.layout import Layout
from lora_ws.collection.card import DatasetCard
from lora_ws.config import dump_yaml
from lora_ws.errors import DataError

WEIGHTS, ROWS, LAYOUT, CARD, MANIFEST = (
    "weights.npy",
    "rows.parquet",
    "layout.json",
    "card.yaml",
    "manifest.json",
)
QUARANTINE = "quarantine.jsonl"
JOURNAL = "journal.jsonl"
# Of the manifest: what the writer says of the content. The rest is where it came from.
COUNTED = ("rows", "quarantined", "fingerprint", "sha256")
HEADER_BYTES = 128


class StoreWriter:
    """Appends rows to a store under construction; use as a context manager.

    Args:
        path: the store to make; must not exist.
        layout: columns of the weights.
        card: written beside them.
        origin: what the rows come from; an unfinished store is continued only if it is equal.
        resume: whether to continue an unfinished store; otherwise it is begun anew.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        card: DatasetCard,
        origin: Mapping[str, Any],
        *,
        resume: bool = True,
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.card = card
        self.origin = dict(origin)
        self.resume = resume
        self.schema = pa.schema([])
        self.rows = 0
        self.batches = 0
        self.quarantine: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._dir = partial_path(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            busy = f"{self.path} is being written by another process"
            lock = self.path.with_name(self.path.name + ".lock")
            held.enter_context(journal.locked(lock, busy, remove=True))
            if self.path.exists():
                raise DataError(f"{self.path} exists already; choose another place or remove it")
            self._weights = held.enter_context(self._resume())
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

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
        if rows.num_rows:
            self._widen(rows.schema)
        np.ascontiguousarray(weights, "<f4").tofile(self._weights)
        self._weights.flush()
        os.fsync(self._weights.fileno())
        if rows.num_rows:
            pq.write_table(rows, self._part(self.batches))
        line = {"rows": rows.num_rows, "quarantine": list(quarantine)}
        journal.append(self._dir / JOURNAL, [line])
        self._count(line)

    def finish(self) -> None:
        """Close the store: all its files appear under the final name at once."""
        if not self.rows:
            self._give_up()
        self._weights.seek(0)
        self._weights.write(_npy_header(self.rows, self.layout.size))
        self._weights.flush()
        os.fsync(self._weights.fileno())
        # Windows renames no folder and deletes no file that is open.
        self._weights.close()
        digest = self._write_rows()
        (self._dir / LAYOUT).write_text(json.dumps(self.layout.to_dict()), encoding="utf-8")
        dump_yaml(self.card, self._dir / CARD)
        if self.quarantine:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.quarantine)
            (self._dir / QUARANTINE).write_text(lines, encoding="utf-8")
        manifest = {
            "rows": self.rows,
            "quarantined": len(self.quarantine),
            "fingerprint": self.layout.fingerprint,
            "sha256": digest,
            **self.origin,
        }
        (self._dir / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        self._dir.rename(self.path)
        # Last, so that a kill before the renaming leaves an import that can be continued.
        shutil.rmtree(self.path / "rows")
        (self.path / JOURNAL).unlink()

    def parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The table rows committed so far, a batch at a time."""
        for batch in range(self.batches):
            if self._part(batch).exists():
                yield pq.read_table(self._part(batch), columns=columns)

    def _write_rows(self) -> str:
        """Join the parts, one after the other; returns a hash of their content hashes in order."""
        digest = hashlib.sha256()
        with pq.ParquetWriter(self._dir / ROWS, self.schema) as out:
            for part in self.parts():
                whole = pa.concat_tables(
                    [self.schema.empty_table(), part], promote_options="permissive"
                )
                out.write_table(whole.cast(self.schema))
                for value in part["sha256"].to_pylist():
                    digest.update(str(value).encode())
        return digest.hexdigest()

    def _widen(self, schema: pa.Schema) -> None:
        """Make room for the columns of one more batch."""
        try:
            self.schema = pa.unify_schemas([self.schema, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{self.path}: a column is of another kind than in earlier rows ({error}); "
                "correct the source"
            ) from error

    def _give_up(self) -> NoReturn:
        """No row fits: say why, and leave nothing behind that would hinder another try."""
        self._weights.close()
        shutil.rmtree(self._dir)
        first = self.quarantine[0] if self.quarantine else {}
        why = f"; first: {first['source']}: {first['reason']}" if first else ": the source is empty"
        raise DataError(f"{self.path}: no row could be imported{why}. Nothing was stored")

    def _part(self, batch: int) -> Path:
        return self._dir / "rows" / f"{batch:06d}.parquet"

    def _count(self, line: Mapping[str, Any]) -> None:
        self.rows += line["rows"]
        self.quarantine += line["quarantine"]
        self.batches += 1

    def _resume(self) -> BinaryIO:
        """Start anew, or continue behind the last committed batch; returns the open weights."""
        file = self._dir / JOURNAL
        head = {"origin": self.origin, "fingerprint": self.layout.fingerprint}
        lines = journal.read(file) if self.resume else []
        # An import that had not committed anything is no loss, whatever it was of.
        if len(lines) > 1 and lines[0] != head:
            raise DataError(
                f"{self._dir} holds an unfinished import of something else (other files, options "
                "or layout); remove it, or choose another place"
            )
        if len(lines) < 2:
            shutil.rmtree(self._dir, ignore_errors=True)
            (self._dir / "rows").mkdir(parents=True)
            (self._dir / WEIGHTS).write_bytes(b"\0" * HEADER_BYTES)
            journal.append(file, [head])
        journal.mend(file)
        for line in lines[1:]:
            self._count(line)
        for batch in range(self.batches):
            if self._part(batch).exists():
                self._widen(pq.read_schema(self._part(batch)))
        expected = HEADER_BYTES + 4 * self.layout.size * self.rows
        if (self._dir / WEIGHTS).stat().st_size < expected:
            raise DataError(f"{self._dir}: {WEIGHTS} is shorter than its journal says; remove it")
        weights = (self._dir / WEIGHTS).open("r+b")
        weights.truncate(expected)
        weights.seek(0, os.SEEK_END)
        return weights


def row_hashes(weights: Float[np.ndarray, "rows params"]) -> list[str]:
    """Content hash of each row."""
    rows = np.ascontiguousarray(weights, "<f4")
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]


def _npy_header(rows: int, columns: int) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    length = HEADER_BYTES - 10
    text = header.ljust(length - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.encode("latin1")


def partial_path(path: Path) -> Path:
    """Where a store is while it is being made."""
    return path.with_name(path.name + ".partial")
