"""Arrow list columns to float32 rows, by flattening: no Python object per number, or per row."""

# pyarrow makes its compute functions at run time, where the type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Columns that an import adds; those of the source keep their values under another name.
OURS = ("source", "sha256")


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same columns in arrow's own types.

    Which types a file's columns have depends on the process: once `datasets` is imported, those
    that it calls Array2D are of a type of its own.

    Args:
        batch: of a file.
    """
    arrays = [_plain(array) for array in batch.columns]
    return pa.RecordBatch.from_arrays(arrays, batch.schema.names, metadata=batch.schema.metadata)


def _plain(array: pa.Array) -> pa.Array:
    """A column in arrow's own types; tensors of arrow as nested lists, views of lists as lists."""
    if isinstance(array.type, pa.FixedShapeTensorType) and len(array.type.shape) > 1:
        kind, flat = array.type, array.storage
        numbers = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, *kind.shape)
        # What stands in a file may be in another order of axes than what is meant.
        order = kind.permutation or range(len(kind.shape))
        numbers = numbers.transpose(0, *(1 + axis for axis in order))
        found = pa.array(numbers.ravel(), kind.value_type)
        for length in reversed(numbers.shape[1:]):
            found = pa.FixedSizeListArray.from_arrays(found, length)
        if not flat.null_count:
            return found
        places = pc.if_else(flat.is_valid(), np.cumsum(flat.is_valid().to_pylist()) - 1, None)
        return found.take(places)
    if isinstance(array.type, pa.BaseExtensionType):
        return _plain(array.storage)
    if _is_view(array.type):
        return array.cast(_without_views(array.type))
    return array


def _is_view(kind: pa.DataType) -> bool:
    return pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def _without_views(kind: pa.DataType) -> pa.DataType:
    if _is_view(kind):
        return pa.large_list(_without_views(kind.value_type))
    return kind


def decode_matrix(column: pa.Array, shape: tuple[int, int], out: np.ndarray) -> dict[int, str]:
    """Write a list column into ``out [rows, shape[0] * shape[1]]``.

    Args:
        column: one value per row: a list of lists, a list, or the fixed-size kinds of both.
        shape: expected rows and columns of the matrix.
        out: where the numbers go, row-major; rows with a problem are left undefined.

    Returns:
        Row -> what is wrong with it: a missing value, another shape, NaN or infinity.
    """
    problems = _misshapen(column, shape)
    kept = np.setdiff1d(np.arange(len(column)), list(problems))
    # A float64 beyond float32's range becomes infinite, which is found below.
    with np.errstate(over="ignore"):
        if problems:
            good = _numbers(column.take(pa.array(kept, pa.int64())))
            out[kept] = good.reshape(len(kept), out.shape[1])
        else:
            out[:] = _numbers(column).reshape(out.shape)
    if not np.isfinite(out[kept] if problems else out).all():
        for row in kept[~np.isfinite(out[kept]).all(axis=1)]:
            problems[int(row)] = "holds NaN or infinite values"
    return problems


def metadata_columns(batch: pa.RecordBatch, weights: list[str]) -> pa.Table:
    """The columns that hold no weights, text as text and lists of text as lists of it.

    Class numbers of `datasets` features are spelt out, in lists of them too.
    """
    dropped = set(weights)
    table = pa.Table.from_batches(
        [batch.select([n for n in batch.schema.names if n not in dropped])]
    )
    info = json.loads((batch.schema.metadata or {}).get(b"huggingface", b"{}"))
    for name, feature in (info.get("info", {}).get("features") or {}).items():
        if name in table.column_names and (names := _class_names(feature)):
            spelt = _spelt(table[name].combine_chunks(), names)
            table = table.set_column(table.column_names.index(name), name, spelt)
    for place, field in enumerate(table.schema):
        if (kind := _text(field.type)) != field.type:
            table = table.set_column(place, field.name, table[field.name].cast(kind))
    ours = {name: f"original_{name}" for name in OURS}
    table = table.rename_columns([ours.get(name, name) for name in table.column_names])
    return table.replace_schema_metadata(None)


def _class_names(feature: Any) -> list[str]:
    """Names of a feature of `datasets` that holds classes, or lists of them; else none."""
    # Older versions of `datasets` describe a list by a list.
    if isinstance(feature, list):
        return _class_names(feature[0]) if feature else []
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") == "ClassLabel":
        return feature["names"]
    return _class_names(feature["feature"]) if "feature" in feature else []


def _spelt(codes: pa.Array, names: Sequence[str]) -> pa.Array:
    """Names in place of their numbers."""
    if is_list(codes.type):
        spelt = [
            row and [names[k] for k in row if k in range(len(names))] for row in codes.to_pylist()
        ]
        return pa.array(spelt, pa.list_(pa.string()))
    # -1 is how `datasets` says that a row has no label.
    known = pc.and_(pc.greater_equal(codes, 0), pc.less(codes, len(names)))
    return pa.array(names).take(pc.if_else(known, codes, None))


def _text(kind: pa.DataType) -> pa.DataType:
    """The plain type of text, or of lists of text; any other as it is."""
    if pa.types.is_dictionary(kind):
        return _text(kind.value_type) if _text(kind.value_type) == pa.string() else kind
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if is_list(kind) and _text(kind.value_type) == pa.string():
        return pa.list_(pa.string())
    return kind


def _misshapen(column: pa.Array, shape: tuple[int, int]) -> dict[int, str]:
    """Rows whose nested lengths are not those of the matrix."""
    if not _holds_numbers(column.type):
        return dict.fromkeys(range(len(column)), f"holds {column.type}, expected lists of numbers")
    rows, columns = shape
    missing = column.is_null().to_numpy(zero_copy_only=False)
    outer = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    inner = column.flatten()
    if not is_list(inner.type):
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
    while is_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)


def _holds_numbers(kind: pa.DataType) -> bool:
    """Whether a type is lists of numbers, or lists of such lists."""
    depth = 0
    while is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth in (1, 2) and (pa.types.is_floating(kind) or pa.types.is_integer(kind))


def is_list(kind: pa.DataType) -> bool:
    """Tell whether a type is lists, of any or of one length."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
