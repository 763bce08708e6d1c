"""Arrow list columns to float32 rows, by flattening: no Python object per number, or per row."""

# pyarrow makes its compute functions at run time, where the type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def decode_matrix(column: pa.Array, shape: tuple[int, int], out: np.ndarray) -> dict[int, str]:
    """Write a list column into ``out [rows, shape[0] * shape[1]]``.

    Args:
        column: one value a row: a list of lists, a list, or the fixed-size kinds of both.
        shape: expected rows and columns of the matrix.
        out: where the numbers go, row-major; rows with a problem are left undefined.

    Returns:
        Row -> what is wrong with it: a missing value, another shape, NaN or infinity.
    """
    problems = _misshapen(column, shape)
    if problems:
        good = np.ones(len(column), bool)
        good[list(problems)] = False
        kept = np.flatnonzero(good)
        values = _numbers(column.take(pa.array(kept))).reshape(len(kept), -1)
        out[kept] = values
    else:
        kept = np.arange(len(column))
        out[:] = _numbers(column).reshape(out.shape)
    if not np.isfinite(out[kept] if problems else out).all():
        for row in kept[~np.isfinite(out[kept]).all(axis=1)]:
            problems[int(row)] = "holds NaN or infinite values"
    return problems


def first_shape(column: pa.Array, role: str, rank: int) -> tuple[int, ...]:
    """Shape of the matrix in the first row; a flat list is read by the row's rank."""
    lengths = []
    while _is_list(column.type):
        first = column.slice(0, 1)
        lengths.append(int(pc.list_value_length(first)[0].as_py() or 0))
        column = first.flatten()
    if len(lengths) != 1:
        return tuple(lengths)
    other = lengths[0] // rank
    return (rank, other) if role == "down" else (other, rank)


def metadata_columns(batch: pa.RecordBatch, weights: list[str]) -> pa.Table:
    """The columns that hold no weights, class numbers of `datasets` features spelt out."""
    dropped = set(weights)
    table = pa.Table.from_batches(
        [batch.select([n for n in batch.schema.names if n not in dropped])]
    )
    info = json.loads((batch.schema.metadata or {}).get(b"huggingface", b"{}"))
    for name, feature in info.get("info", {}).get("features", {}).items():
        if name in table.column_names and feature.get("_type") == "ClassLabel":
            names = pa.array(feature["names"])
            spelt = names.take(table[name].combine_chunks())
            table = table.set_column(table.column_names.index(name), name, spelt)
    return table.replace_schema_metadata(None)


def _misshapen(column: pa.Array, shape: tuple[int, int]) -> dict[int, str]:
    """Rows whose nested lengths are not those of the matrix."""
    if not _is_list(column.type):
        return dict.fromkeys(range(len(column)), f"holds {column.type}, expected lists of numbers")
    rows, columns = shape
    missing = column.is_null().to_numpy(zero_copy_only=False)
    outer = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    inner = column.flatten()
    if not _is_list(inner.type):
        wrong = (outer != rows * columns) | _any_null(inner, outer)
        return _name(wrong, missing, outer, f"expected {rows * columns} numbers")
    lengths = pc.fill_null(pc.list_value_length(inner), -1).to_numpy(zero_copy_only=False)
    numbers = inner.flatten()
    if (outer == rows).all() and (lengths == columns).all() and not numbers.null_count:
        return {}
    owner = np.repeat(np.arange(len(column)), np.maximum(outer, 0))
    ragged = np.zeros(len(column), bool)
    ragged[owner[lengths != columns]] = True
    if numbers.null_count:
        holder = np.repeat(owner, np.maximum(lengths, 0))
        ragged[holder[numbers.is_null().to_numpy(zero_copy_only=False)]] = True
    return _name((outer != rows) | ragged, missing, outer, f"expected a {rows}x{columns} matrix")


def _any_null(values: pa.Array, lengths: np.ndarray) -> np.ndarray:
    nulls = np.zeros(len(lengths), bool)
    if values.null_count:
        owner = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))
        nulls[owner[values.is_null().to_numpy(zero_copy_only=False)]] = True
    return nulls


def _name(wrong: np.ndarray, missing: np.ndarray, got: np.ndarray, expected: str) -> dict[int, str]:
    return {
        int(row): f"{expected}, got "
        + ("nothing (null)" if missing[row] else f"a list of {got[row]} with other contents")
        for row in np.flatnonzero(wrong | missing)
    }


def _numbers(column: pa.Array) -> np.ndarray:
    while _is_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
