"""The folder of an index: unit sketches in one file, their names in parts of a table beside it.

``index.json`` says what the sketches are, ``sketches.f32`` holds one per row, and ``rows/`` the
table in parts of `PART_ROWS`. A row counts once the table names it. The table is written last and a
part replaced as a whole, so a kill loses the batch at hand and nothing else.
"""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Shaped

from lora_ws.errors import DataError, NotAvailableError
from lora_ws.functional.sketch import METHOD
from lora_ws.journal import locked

HEAD, SKETCHES, ROWS, LOCK = "index.json", "sketches.f32", "rows", "write.lock"
PART_ROWS = 4096
SCHEMA = pa.schema([("name", pa.string()), ("norm", pa.float64()), ("hash", pa.string())])
EMPTY = pa.Table.from_batches([], SCHEMA)
# Hexadecimal digits of a hash.
HASH_LENGTH = 64


class Signature(NamedTuple):
    """What an index keeps of an adapter: `sketch`, `update_norm` and `update_hash`.

    The hash of a file that holds more than its update goes on with what tells the file apart: the
    update alone does not make it equal to another. It is empty where it was not asked for.
    """

    sketch: Float[np.ndarray, " size"]
    norm: float
    hash: str


def create(folder: Path, side: int) -> None:
    """Make an empty index.

    Args:
        folder: absent, or empty but for what a killed attempt left.
        side: of the sketches.

    Raises:
        DataError: there is something else in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = {SKETCHES, ROWS, HEAD + ".partial"}
    if other := sorted(path.name for path in folder.iterdir() if path.name not in ours):
        raise DataError(
            f"{folder}: expected an index of adapters or an empty folder, found `{other[0]}`; "
            "choose another folder"
        )
    (folder / ROWS).mkdir(exist_ok=True)
    (folder / SKETCHES).touch()
    partial = folder / (HEAD + ".partial")
    partial.write_text(json.dumps({"method": METHOD, "side": side}), encoding="utf-8")
    partial.replace(folder / HEAD)


def read(folder: Path) -> tuple[int, np.ndarray, pa.Table]:
    """Side, mapped sketches ``[n, side * side]`` and table of an index.

    Raises:
        NotAvailableError: there is no index in the folder.
        DataError: it is damaged, or of a kind that this version does not read.
    """
    if not (folder / HEAD).is_file():
        raise NotAvailableError(
            f"{folder}: expected a folder with an index of adapters, found no {HEAD}; build one"
        )
    side = _side(folder)
    try:
        rows = pa.concat_tables([EMPTY, *map(_part, _parts(folder))])
        shape = (len(rows), side * side)
        if (folder / SKETCHES).stat().st_size < 4 * shape[0] * shape[1]:
            raise ValueError(f"{SKETCHES} holds fewer than the {len(rows)} rows that are named")
        # An empty file cannot be mapped.
        mapped = np.memmap(folder / SKETCHES, "<f4", "r", shape=shape) if len(rows) else None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{folder}: the index is damaged ({error}); remove it and build it again"
        ) from error
    return side, np.empty(shape, "<f4") if mapped is None else mapped, rows


def writing(folder: Path) -> AbstractContextManager[None]:
    """Keep other writers away.

    Raises:
        DataError: another process writes.
    """
    return locked(folder / LOCK, f"{folder} is being written by another process; wait for it")


def append(folder: Path, side: int, names: Sequence[str], signatures: Sequence[Signature]) -> None:
    """Write rows for good: the sketches first, then the parts of the table that make them count.

    Args:
        folder: of an index, kept by `writing`.
        side: of its sketches.
        names: of the new rows.
        signatures: of the new rows.

    Raises:
        DataError: a sketch does not fit or is not finite.
    """
    if not names:
        return
    sketches = np.array([one.sketch for one in signatures])
    if sketches.shape != (len(names), side**2) or not np.isfinite(sketches).all():
        raise DataError(
            f"expected finite sketches [{len(names)}, {side**2}], got {list(sketches.shape)}; "
            f"sketch adapters of finite factors with side={side}"
        )
    parts = _parts(folder)
    last = _part(parts[-1]) if parts else EMPTY
    full = max(0, len(parts) - 1)
    with (folder / SKETCHES).open("r+b") as file:
        # What stands behind the last row that counts is of a batch that was killed.
        file.truncate(4 * side**2 * (full * PART_ROWS + len(last)))
        file.seek(0, os.SEEK_END)
        unit(sketches).astype("<f4").tofile(file)
        file.flush()
        os.fsync(file.fileno())
    norms = numbers(np.array([one.norm for one in signatures], np.float64))
    columns = [strings(names), norms, strings([one.hash for one in signatures])]
    rows = pa.concat_tables([last, pa.Table.from_arrays(columns, schema=SCHEMA)])
    for part, start in enumerate(range(0, len(rows), PART_ROWS), full):
        partial = folder / ROWS / f"{part:06d}.partial"
        pq.write_table(rows.slice(start, PART_ROWS), partial)
        # Open for writing, as Windows flushes nothing else.
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        partial.replace(partial.with_suffix(".parquet"))


# Columns that Arrow makes of lists or arrays load pandas, which takes longer than to scan a file.
def numbers(values: Shaped[np.ndarray, " rows"]) -> pa.Array:
    """A column of numbers.

    Example:
        >>> numbers(np.arange(3)).to_pylist()
        [0, 1, 2]
    """
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def strings(values: Sequence[str]) -> pa.Array:
    """A column of text.

    Example:
        >>> strings(["a", "über", ""]).to_pylist()
        ['a', 'über', '']
    """
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))
    return pa.StringArray.from_buffers(len(encoded), *buffers)


def unit(sketches: Float[np.ndarray, "q size"]) -> Float[np.ndarray, "q size"]:
    """Float32 rows of norm 1; zeros stay zeros.

    Args:
        sketches: of any norm.

    Example:
        >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6, 0.8], [0.0, 0.0]]
    """
    # The largest number first, so that no square over- or underflows.
    largest = np.abs(sketches).max(axis=1, keepdims=True).astype(np.float64)
    scaled = sketches / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    return (scaled / np.where(norms > 0, norms, 1)).astype(np.float32)


def _side(folder: Path) -> int:
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        method, side = head["method"], head["side"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: {HEAD} is not that of an index of adapters ({error}); choose another folder"
        ) from error
    if method != METHOD or not isinstance(side, int) or side < 1:
        raise DataError(
            f"{folder}: expected sketches made by `{METHOD}`, got `{method}` of side {side}; "
            "build the index again with this version"
        )
    return side


def _parts(folder: Path) -> list[Path]:
    """The parts of the table in order; all but the last are full."""
    parts = sorted((folder / ROWS).glob("*.parquet"))
    expected = [f"{part:06d}" for part in range(len(parts))]
    if not (folder / ROWS).is_dir() or [part.stem for part in parts] != expected:
        raise DataError(f"{folder}: a part of the table is missing; remove it and build it again")
    for part in parts[:-1]:
        if pq.read_metadata(part).num_rows != PART_ROWS:
            raise DataError(f"{folder}: {part.name} is cut short; remove it and build it again")
    return parts


def _part(path: Path) -> pa.Table:
    table = pq.ParquetFile(path).read()
    if table.schema != SCHEMA:
        raise ValueError(f"{path.name} has columns {', '.join(table.column_names)}")
    return table
