"""Rows from adapter files below a folder, with the metadata that stands beside them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_ws.adapters.layout import Layout
from lora_ws.adapters.reader import read_adapter
from lora_ws.collection.decode import OURS
from lora_ws.collection.source import Batch, Problem, batch_rows
from lora_ws.errors import AdapterError, DataError, LayoutError


@dataclass(frozen=True)
class FilesSource:
    """Adapter files below a folder, in natural order of their paths.

    Beside a file may stand ``metadata.json``, as in ``<category>/folder_00000/``; where none does,
    the top folder names the category.
    """

    root: Path
    files: Sequence[Path]

    def identity(self) -> Mapping[str, Any]:
        """Relative paths and sizes."""
        files = [[f.relative_to(self.root).as_posix(), f.stat().st_size] for f in self.files]
        return {"kind": "files", "files": files}

    def count(self) -> int:
        """One row per file."""
        return len(self.files)

    def find_layout(self) -> Layout:
        """From the first file that can be read."""
        reason = ""
        for file in self.files:
            try:
                return read_adapter(file).layout
            except AdapterError as error:
                reason = reason or str(error)
        raise DataError(f"none of {len(self.files)} files is a readable adapter; first: {reason}")

    def batches(self, layout: Layout, skip: int) -> Iterator[Batch]:
        """Read the files, some at a time."""
        size = batch_rows(layout)
        for start in range(skip * size, len(self.files), size):
            vectors, rows, problems = [], [], []
            for file in self.files[start : start + size]:
                name = file.relative_to(self.root).as_posix()
                try:
                    vector, row = self._read(file, layout)
                except (AdapterError, LayoutError, DataError) as error:
                    reason = str(error).removeprefix(f"{file}: ")
                    problems.append(Problem(name, reason))
                    continue
                vectors.append(vector)
                rows.append(row)
            table, odd = _table(rows)
            problems += [Problem(rows[k]["source"], reason) for k, reason in odd.items()]
            vectors = [vector for k, vector in enumerate(vectors) if k not in odd]
            weights = np.stack(vectors) if vectors else np.empty((0, layout.size), np.float32)
            yield Batch(weights, table, problems)

    def _read(self, file: Path, layout: Layout) -> tuple[np.ndarray, dict[str, Any]]:
        adapter = read_adapter(file)
        difference = layout.difference(adapter.layout)
        if difference:
            raise LayoutError(f"another layout than the rest of the collection: {difference}")
        relative = file.relative_to(self.root)
        row: dict[str, Any] = {}
        if len(relative.parts) > 1:
            row["category_label"] = relative.parts[0]
        metadata = file.with_name("metadata.json")
        if metadata.is_file():
            row |= _metadata(metadata)
        row.setdefault("folder", relative.parent.as_posix())
        row["source"] = relative.as_posix()
        row["file_sha256"] = adapter.sha256
        row["ignored_tensors"] = len(adapter.beyond_layout)
        vector = adapter.flat()
        if not np.isfinite(vector).all():
            raise DataError("its scale takes values beyond float32")
        return vector, row


def _metadata(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"its metadata.json is not readable ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"its metadata.json holds {type(found).__name__}, expected an object")
    return {f"original_{key}" if key in OURS else key: value for key, value in found.items()}


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[pa.Table, dict[int, str]]:
    """The rows as a table of all their columns, and rows whose values are of an odd kind."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    odd: dict[int, str] = {}
    schema = pa.schema([])
    for k, row in enumerate(rows):
        try:
            mine = pa.Table.from_pylist([dict(row)]).schema
            schema = pa.unify_schemas([schema, mine], promote_options="permissive")
        except pa.ArrowException as error:
            odd[k] = f"its metadata is of another kind than that of other files ({error})"
    kept = [{name: row.get(name) for name in columns} for k, row in enumerate(rows) if k not in odd]
    return pa.Table.from_pylist(kept, schema), odd
