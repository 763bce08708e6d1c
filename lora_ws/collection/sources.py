"""Where rows come from: parquet files of the published schemas, or adapter files in folders.

A source yields batches in a fixed order, checks every value, and names what does not fit.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_ws.adapters.keys import parse_key
from lora_ws.adapters.layout import Layout, natural_key
from lora_ws.adapters.reader import read_adapter
from lora_ws.collection.card import DatasetCard
from lora_ws.collection.decode import decode_matrix, first_shape, metadata_columns
from lora_ws.errors import AdapterError, DataError, LayoutError

BATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Problem:
    """Why something was not imported: which file, which row, which column, and the reason."""

    source: str
    reason: str
    row: int | None = None
    column: str | None = None
    rows_lost: int = 1

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        column = "" if self.column is None else f", column `{self.column}`"
        return f"{self.source}{row}{column}: {self.reason}"


@dataclass
class Batch:
    """Rows that fit, and problems with those that do not."""

    weights: np.ndarray
    rows: pa.Table
    problems: list[Problem] = field(default_factory=list)


class Source(Protocol):
    """Something rows can be imported from."""

    def identity(self) -> Mapping[str, Any]:
        """What it is; an interrupted import continues only from an equal source."""
        ...

    def count(self) -> int:
        """How many rows it holds, good and bad."""
        ...

    def find_layout(self) -> Layout:
        """The layout of its first usable row."""
        ...

    def batches(self, layout: Layout, skip: int) -> Iterator[Batch]:
        """All batches but the first ``skip``."""
        ...


def batch_rows(layout: Layout) -> int:
    """Rows to a batch, so that memory stays the same whatever the layout."""
    return max(1, min(1024, BATCH_BYTES // (4 * layout.size)))


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files: one list column a matrix, or one flat vector column."""

    files: Sequence[Path]
    card: DatasetCard

    def identity(self) -> Mapping[str, Any]:
        """Names, sizes and schema kind."""
        files = [[file.name, file.stat().st_size] for file in self.files]
        return {"kind": "parquet", "schema": self.card.schema, "files": files}

    def count(self) -> int:
        """Rows by the files' footers; unreadable files count as one."""
        return sum(_rows_of(file) for file in self.files)

    def find_layout(self) -> Layout:
        """From the shapes of the first row of the first readable file."""
        if self.card.schema == "flat_column":
            raise DataError(
                f"card `{self.card.name}` has flat vectors, whose matrices no file can tell: "
                "expected `layout:` in the card or --layout"
            )
        reason = ""
        for file in self.files:
            try:
                opened = pq.ParquetFile(file, memory_map=True)
                first = next(opened.iter_batches(batch_size=1), None)
            except (OSError, pa.ArrowException) as error:
                reason = str(error)
                continue
            if first is not None:
                return _layout_of(first, file)
        raise DataError(f"no readable row in {len(self.files)} parquet files {reason}")

    def batches(self, layout: Layout, skip: int) -> Iterator[Batch]:
        """Read row groups in order; those before the resume point are not decoded."""
        size = batch_rows(layout)
        for file in self.files:
            try:
                opened = pq.ParquetFile(file, memory_map=True)
                columns = self._columns(opened.schema_arrow, layout)
            except (OSError, pa.ArrowException) as error:
                if not skip:
                    yield _lost(file, f"not a readable parquet file ({error})", layout)
                skip = max(skip - 1, 0)
                continue
            except DataError as error:
                if not skip:
                    yield _lost(file, str(error), layout, rows=_rows_of(file))
                skip = max(skip - 1, 0)
                continue
            start = 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                here = -(-rows // size)
                if skip < here:
                    read = opened.iter_batches(size, row_groups=[group])
                    offset = start + skip * size
                    for batch in islice(read, skip, None):
                        yield self._decode(batch, file, offset, layout, columns)
                        offset += batch.num_rows
                skip = max(skip - here, 0)
                start += rows

    def _columns(self, schema: pa.Schema, layout: Layout) -> list[str]:
        """Column names in layout order."""
        if self.card.schema == "flat_column":
            if self.card.weights_column not in schema.names:
                raise DataError(f"missing column `{self.card.weights_column}`")
            return [self.card.weights_column]
        named = {}
        for name in schema.names:
            key = parse_key(name)
            if key is not None:
                named[key.path, key.role] = name
        wanted = [(matrix.layer.name, matrix.role) for matrix in layout.matrices]
        for path, role in wanted:
            if (path, role) not in named:
                raise DataError(f"missing column `unet.{path}.lora.{role}.weight`")
        extra = [name for key, name in named.items() if key not in set(wanted)]
        if extra:
            raise DataError(f"column `{extra[0]}` is not part of the layout")
        return [named[key] for key in wanted]

    def _decode(
        self, batch: pa.RecordBatch, file: Path, offset: int, layout: Layout, columns: list[str]
    ) -> Batch:
        if self.card.schema == "flat_column":
            shapes = [((1, layout.size), slice(0, layout.size))]
        else:
            shapes = [(matrix.shape, matrix.columns) for matrix in layout.matrices]
        weights = np.empty((batch.num_rows, layout.size), np.float32)
        problems: dict[int, Problem] = {}
        for name, (shape, where) in zip(columns, shapes, strict=True):
            bad = decode_matrix(batch.column(name), shape, weights[:, where])
            for row, reason in bad.items():
                problems.setdefault(row, Problem(file.name, reason, offset + row, name))
        keep = np.ones(batch.num_rows, bool)
        keep[list(problems)] = False
        rows = metadata_columns(batch, columns)
        source = pa.array([f"{file.name}:{offset + k}" for k in range(batch.num_rows)])
        rows = rows.append_column("source", source)
        if problems:
            weights, rows = weights[keep], rows.filter(pa.array(keep))
        return Batch(weights, rows, [problems[row] for row in sorted(problems)])


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
        """One row a file."""
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
            weights = np.stack(vectors) if vectors else np.empty((0, layout.size), np.float32)
            yield Batch(weights, pa.Table.from_pylist(rows), problems)

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
            try:
                row |= json.loads(metadata.read_text())
            except ValueError as error:
                raise DataError(f"its metadata.json is not readable ({error})") from error
        row.setdefault("folder", relative.parent.as_posix())
        row["source"] = relative.as_posix()
        row["file_sha256"] = adapter.sha256
        return adapter.flat(), row


def find_source(paths: Sequence[Path], card: DatasetCard) -> Source:
    """Choose the importer for what is at ``paths``: parquet files, or folders of adapters.

    Raises:
        DataError: there is nothing to import.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    parquet = [f for path in paths for f in _below(path, ".parquet")]
    if parquet:
        return ParquetSource(parquet, card)
    adapters = [f for path in paths for f in _below(path, ".safetensors")]
    if not adapters:
        raise DataError(
            f"{', '.join(map(str, paths))}: expected .parquet or .safetensors files, found none"
        )
    root = paths[0] if len(paths) == 1 and paths[0].is_dir() else _common_parent(adapters)
    return FilesSource(root, adapters)


def _below(path: Path, suffix: str) -> list[Path]:
    found = [path] if path.is_file() else path.rglob(f"*{suffix}")
    return sorted((f for f in found if f.suffix == suffix), key=lambda f: natural_key(str(f)))


def _common_parent(files: Sequence[Path]) -> Path:
    parents = [set(file.parents) for file in files]
    return max(set.intersection(*parents), key=lambda parent: len(parent.parts))


def _rows_of(file: Path) -> int:
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return 1


def _lost(file: Path, reason: str, layout: Layout, rows: int = 1) -> Batch:
    """A batch for a file none of whose rows can be read."""
    empty = np.empty((0, layout.size), np.float32)
    return Batch(empty, pa.table({}), [Problem(file.name, reason, rows_lost=rows)])


def _layout_of(row: pa.RecordBatch, file: Path) -> Layout:
    rank = row.column("rank")[0].as_py() if "rank" in row.schema.names else 1
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in row.schema.names:
        key = parse_key(name)
        if key is not None and key.role in ("down", "up"):
            shape = first_shape(row.column(name), key.role, rank or 1)
            shapes.setdefault(key.path, {})[key.role] = shape
    if not shapes:
        raise DataError(
            f"{file.name}: expected columns such as `unet.<path>.lora.down.weight`, got "
            f"{', '.join(row.schema.names[:6])}; for one vector column set `schema: flat_column`"
        )
    try:
        return Layout.from_shapes(shapes)
    except LayoutError as error:
        raise DataError(f"{file.name}: {error}") from error
