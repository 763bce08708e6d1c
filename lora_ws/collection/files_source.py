"""Rows from adapter files below a folder, with the metadata that stands beside them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_ws.adapters.adapter import Adapter
from lora_ws.adapters.layout import Layout
from lora_ws.adapters.projection import common_layout, project_adapter
from lora_ws.adapters.reader import open_adapter, read_adapter
from lora_ws.collection.beside import LabelTables, own_metadata, read_tables, sidecars
from lora_ws.collection.decode import OURS
from lora_ws.collection.source import Batch, Problem, batch_rows
from lora_ws.errors import AdapterError, DataError, LayoutError

# Files that are looked at to choose a layout for all, spread over the collection.
SURVEYED = 256


@dataclass(frozen=True)
class FilesSource:
    """Adapter files below a folder, in natural order of their paths.

    What is said of a file comes, the later before the earlier, from its top folder, which names
    the category; its header; sidecars and ``metadata.json`` beside it (see
    `lora_ws.collection.beside`); and a table of labels.

    Attributes:
        root: the folder.
        files: below it.
        project: bring adapters of other ranks and modules into the layout, with columns
            ``retained_energy``, ``layers_missing`` and ``layer_mask``; else they are problems.
        min_energy: share of the squared norm of an update that has to fit the layout.
        categories: of files, instead of their top folders.
    """

    root: Path
    files: Sequence[Path]
    project: bool = False
    min_energy: float = 0.0
    categories: Mapping[Path, str] = field(default_factory=dict)

    @cached_property
    def tables(self) -> LabelTables:
        """Labels that tables in the folders give."""
        return read_tables(self.root, self.files)

    def identity(self) -> Mapping[str, Any]:
        """Relative paths and sizes, and how other layouts are met."""
        files = [[f.relative_to(self.root).as_posix(), f.stat().st_size] for f in self.files]
        tables = [
            [f.relative_to(self.root).as_posix(), f.stat().st_size] for f in self.tables.files
        ]
        found: dict[str, Any] = {"kind": "files", "files": files}
        if tables:
            found["tables"] = tables
        if self.project:
            found["project"] = self.min_energy
        return found

    def count(self) -> int:
        """One row per file."""
        return len(self.files)

    def find_layout(self) -> Layout:
        """From the first file that can be read; to project, what most files have in common."""
        reason, found = "", []
        step = max(1, len(self.files) // SURVEYED)
        for file in self.files[::step] if self.project else self.files:
            try:
                with open_adapter(file) as opened:
                    found.append((opened.base.name, opened.read().layout))
            except AdapterError as error:
                reason = reason or str(error)
                continue
            if not self.project:
                break
        if not found:
            said = f"none of {len(self.files)} files is a readable adapter; first: {reason}"
            raise DataError(said)
        return common_layout(found)

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
        vector, fit = self._vector(adapter, layout)
        if not np.isfinite(vector).all():
            raise DataError("its scale takes values beyond float32")
        relative = file.relative_to(self.root)
        row: dict[str, Any] = {}
        category = self.categories.get(file) or (relative.parts[0] if relative.parts[1:] else "")
        if category:
            row["category_label"] = category
        row |= own_metadata(adapter.metadata) | sidecars(file)
        metadata = file.with_name("metadata.json")
        if metadata.is_file():
            row |= _metadata(metadata)
        row |= self.tables.rows.get(relative.as_posix(), {})
        row.setdefault("folder", relative.parent.as_posix())
        row["source"] = relative.as_posix()
        row["file_sha256"] = adapter.sha256
        row["ignored_tensors"] = len(adapter.beyond_layout)
        return vector, row | fit

    def _vector(self, adapter: Adapter, layout: Layout) -> tuple[np.ndarray, dict[str, Any]]:
        """The row of an adapter, and columns that say how well it fits."""
        if not self.project:
            if difference := layout.difference(adapter.layout):
                raise LayoutError(
                    f"another layout than the rest of the collection: {difference}; --project auto "
                    "takes adapters of several ranks and modules"
                )
            return adapter.flat(), {}
        found = project_adapter(adapter, layout)
        if found.energy < self.min_energy:
            raise LayoutError(
                f"expected at least {self.min_energy:g} of the update's energy in the layout, got "
                f"{found.energy:.3f}; lower --min_energy, or --project a layout of higher rank"
            )
        columns = {
            "retained_energy": found.energy,
            "layers_missing": len(found.missing),
            "layer_mask": [layer.name not in found.missing for layer in layout.layers],
        }
        return found.weights, columns


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
