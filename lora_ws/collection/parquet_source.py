"""Rows from parquet files of the published schemas: one list column per matrix, or one vector."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_ws.adapters.keys import parse_key, split_ending
from lora_ws.adapters.layout import Layout
from lora_ws.adapters.projection import pad_rows
from lora_ws.collection.beside import LABELS
from lora_ws.collection.card import DatasetCard
from lora_ws.collection.decode import (
    decode_matrix,
    is_list,
    metadata_columns,
    plain,
)
from lora_ws.collection.facts import RowFacts
from lora_ws.collection.shapes import first_shapes
from lora_ws.collection.source import Batch, Problem, batch_rows, common_parent
from lora_ws.errors import DataError, LayoutError

# Of each file, to find one that tells the layout.
ROWS_TRIED = 1000


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files: one list column per matrix, or one flat vector column.

    Attributes:
        files: in order.
        card: of the collection.
        facts: what the card says of their paths; a ``rank`` there is that of a file's rows, which
            are padded to the layout's.
    """

    files: Sequence[Path]
    card: DatasetCard
    facts: RowFacts | None = None

    @property
    def label_column(self) -> str:
        """The column that is the label by its name; empty where none is."""
        try:
            names = pq.read_schema(self.files[0]).names
        except (OSError, pa.ArrowException):
            return ""
        return next((name for name in LABELS if name in names), "")

    def identity(self) -> Mapping[str, Any]:
        """Names, sizes and schema kind."""
        files = [[self.label(file), file.stat().st_size] for file in self.files]
        return {"kind": "parquet", "schema": self.card.schema, "files": files}

    def count(self) -> int:
        """Rows by the files' footers; unreadable files count as one."""
        return sum(_rows_of(file) for file in self.files)

    def find_layout(self) -> Layout:
        """From the shapes of the first row that has them in every column."""
        if self.card.schema == "flat_column":
            raise DataError(
                f"card `{self.card.name}` has flat vectors, whose matrices no file can tell: "
                "expected `layout:` in the card or --layout"
            )
        reason = ""
        for file in self.files:
            try:
                read = pq.ParquetFile(file, memory_map=True).iter_batches(batch_size=1)
                for row in islice(read, ROWS_TRIED):
                    try:
                        return _layout_of(plain(row), file)
                    except DataError as error:
                        reason = reason or str(error)
            except (OSError, pa.ArrowException) as error:
                reason = reason or f"{file.name}: {error}"
        reason = reason or "they hold no rows"
        raise DataError(f"no usable row in {len(self.files)} parquet files; first: {reason}")

    def batches(self, layout: Layout, skip: int) -> Iterator[Batch]:
        """Read row groups in order; those before the resume point are not decoded."""
        size = batch_rows(layout)
        for file in self.files:
            try:
                opened = pq.ParquetFile(file, memory_map=True)
                columns = self._columns(opened.schema_arrow, layout)
            except (OSError, pa.ArrowException) as error:
                if not skip:
                    yield _lost(self.label(file), f"not a readable parquet file ({error})", layout)
                skip = max(skip - 1, 0)
                continue
            except DataError as error:
                if not skip:
                    yield _lost(self.label(file), str(error), layout, rows=_rows_of(file))
                skip = max(skip - 1, 0)
                continue
            start = 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                here = -(-rows // size)
                for at, batch in _read_group(opened, group, rows, size, skip):
                    if isinstance(batch, str):
                        where = f"rows {start + at} to {start + min(at + size, rows) - 1}"
                        reason = f"{where} cannot be read ({batch})"
                        yield _lost(self.label(file), reason, layout, min(size, rows - at))
                    else:
                        yield self._decode(batch, file, start + at, layout, columns)
                skip = max(skip - here, 0)
                start += rows

    def label(self, file: Path) -> str:
        """Name of a file in messages and in the table: with its folders where names repeat."""
        if sum(other.name == file.name for other in self.files) == 1:
            return file.name
        return file.relative_to(common_parent(self.files)).as_posix()

    def _columns(self, schema: pa.Schema, layout: Layout) -> list[str]:
        """Column names in layout order."""
        if self.card.schema == "flat_column":
            if self.card.weights_column not in schema.names:
                raise DataError(f"missing column `{self.card.weights_column}`")
            return [self.card.weights_column]
        named = {}
        for name in schema.names:
            key = parse_key(name)
            if key is None and (split_ending(name) or ("", ""))[1] in ("down", "up"):
                raise DataError(f"column `{name}` is not part of the layout")
            if key is None or key.component != "unet":
                continue
            if (held := named.get((key.path, key.role))) is not None:
                raise DataError(f"columns `{held}` and `{name}` are the same matrix")
            named[key.path, key.role] = name
        wanted = [(matrix.layer.name, matrix.role) for matrix in layout.matrices]
        for path, role in wanted:
            if (path, role) not in named:
                raise DataError(f"missing column `unet.{path}.lora.{role}.weight`")
        extra = [name for key, name in named.items() if key not in set(wanted)]
        if extra and not self.card.modules:
            raise DataError(f"column `{extra[0]}` is not part of the layout")
        return [named[key] for key in wanted]

    def _decode(
        self, batch: pa.RecordBatch, file: Path, offset: int, layout: Layout, columns: list[str]
    ) -> Batch:
        told = self.facts.of(file.as_posix()) if self.facts else {}
        own = layout.at_rank(int(told.get("rank", 0))) if told.get("rank") else layout
        if self.card.schema == "flat_column":
            shapes = [((1, own.size), slice(0, own.size))]
        else:
            shapes = [(matrix.shape, matrix.columns) for matrix in own.matrices]
        label = self.label(file)
        weights = np.empty((batch.num_rows, own.size), np.float32)
        problems: dict[int, Problem] = {}
        for name, (shape, where) in zip(columns, shapes, strict=True):
            bad = decode_matrix(batch.column(name), shape, weights[:, where])
            for row, reason in bad.items():
                problems.setdefault(row, Problem(label, reason, offset + row, name))
        keep = np.ones(batch.num_rows, bool)
        keep[list(problems)] = False
        beyond = [n for n in batch.schema.names if self.card.modules and parse_key(n)]
        rows = metadata_columns(batch, list({*columns, *beyond, *told}))
        source = pa.array([f"{label}:{offset + k}" for k in range(batch.num_rows)], pa.string())
        # A table without columns has no length, and takes no column.
        rows = (
            rows.append_column("source", source)
            if rows.num_columns
            else pa.table([source], ["source"])
        )
        for column, value in told.items():
            rows = rows.append_column(column, pa.array([value] * batch.num_rows))
        if problems:
            weights, rows = weights[keep], rows.filter(pa.array(keep))
        if own != layout:
            weights = pad_rows(weights, own, max(layer.rank for layer in layout.layers))
        return Batch(weights, rows, [problems[row] for row in sorted(problems)])


def _rows_of(file: Path) -> int:
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return 1


def _lost(label: str, reason: str, layout: Layout, rows: int = 1) -> Batch:
    """A batch for rows, or a whole file, that cannot be read."""
    empty = np.empty((0, layout.size), np.float32)
    return Batch(empty, pa.table({}), [Problem(label, reason, rows_lost=rows)])


def _read_group(
    opened: pq.ParquetFile, group: int, rows: int, size: int, skip: int
) -> Iterator[tuple[int, pa.RecordBatch | str]]:
    """First row and content of each batch of a row group; for damaged pages the reason.

    There are always as many batches as the footer's number of rows makes, so that a resumed import
    can count them.
    """
    starts = iter(range(skip * size, rows, size))
    try:
        for batch in islice(opened.iter_batches(size, row_groups=[group]), skip, None):
            yield next(starts), plain(batch)
    except (OSError, pa.ArrowException) as error:
        for start in starts:
            yield start, str(error)


def _layout_of(row: pa.RecordBatch, file: Path) -> Layout:
    columns: dict[tuple[str, str], pa.Array] = {}
    for name in row.schema.names:
        key = parse_key(name)
        if key and key.component == "unet" and key.role in ("down", "up"):
            kind = row.schema.field(name).type
            if not is_list(kind):
                raise DataError(
                    f"{file.name}: column `{name}` holds {kind}, expected lists of numbers"
                )
            columns[key.path, key.role] = row.column(name)
    if not columns:
        raise DataError(
            f"{file.name}: expected columns such as `unet.<path>.lora.down.weight`, got "
            f"{', '.join(row.schema.names[:6])}; for one vector column set `schema: flat_column`"
        )
    rank = row.column("rank")[0].as_py() if "rank" in row.schema.names else None
    try:
        return Layout.from_shapes(first_shapes(columns, rank))
    except (DataError, LayoutError) as error:
        raise DataError(f"{file.name}: {error}") from error


def missing_shards(files: Sequence[Path]) -> str:
    """Which shards named ``…-00001-of-00005…`` are not there, in words; empty if none."""
    found: dict[tuple[str, int], int] = {}
    for file in files:
        if match := re.match(r"(.*)-\d+-of-(\d+)", file.name):
            key = match[1], int(match[2])
            found[key] = found.get(key, 0) + 1
    return next(
        (f"{n} of {total} shards of `{stem}`" for (stem, total), n in found.items() if n < total),
        "",
    )
