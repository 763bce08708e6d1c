"""What the columns of a table say about each adapter: a class, a number, or several labels."""

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
import pyarrow as pa

from lora_ws.collection.card import DatasetCard
from lora_ws.config import nearest
from lora_ws.errors import DataError

# What stands for a list of numbers, such as the losses of all epochs.
Reduce = Literal["last", "mean"]


def read_column(rows: pa.Table, card: DatasetCard, name: str) -> np.ndarray:
    """Values of a column.

    Args:
        rows: the table, one row per adapter.
        card: of the collection, for errors.
        name: of the column.

    Raises:
        DataError: there is none of that name.
    """
    if name not in rows.column_names:
        why = f"`{card.name}` has no column `{name}`"
        if name == card.label:
            why += (
                ", its label: put files into a folder per class, or labels into a table beside "
                "them (docs/data_format.md), or name another column with --label"
            )
        known = rows.column_names
        raise DataError(f"{why}{nearest(name, known, few=len(known))}")
    return rows[name].to_numpy(zero_copy_only=False)


def columns_of(rows: pa.Table, label: str) -> tuple[str, ...]:
    """Names of the columns that a label is: one, or several separated by commas."""
    if label in rows.column_names:
        return (label,)
    return tuple(part.strip() for part in label.split(","))


def is_one_class(rows: pa.Table, label: str) -> bool:
    """Whether a label is one class a row: one column, and not of lists."""
    name, *more = columns_of(rows, label)
    if more or name not in rows.column_names:
        return False
    return not pa.types.is_list(rows[name].type)


def read_classes(
    rows: pa.Table, card: DatasetCard, label: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Integer labels and the class names they index, in the card's order for its own label.

    Raises:
        DataError: a row has no label, several, or one that the card does not list.
    """
    if len(several := columns_of(rows, label)) > 1:
        raise DataError(
            f"label: expected one column, got {', '.join(several)}; several are for --task "
            "multilabel, or choose one with --label"
        )
    values = _known(rows, card, label)
    if pa.types.is_nested(rows[label].type):
        raise DataError(
            f"column `{label}` holds {rows[label].type}, expected one class each; lists of "
            "labels are for --task multilabel, or choose a column of text or numbers"
        )
    listed = card.classes if label == card.label else ()
    classes = listed or tuple(map(str, np.unique(values).tolist()))
    codes = {value: code for code, value in enumerate(classes)}
    if unknown := sorted({str(value) for value in values.tolist()} - set(classes)):
        raise DataError(
            f"column `{label}` holds `{unknown[0]}`, which card `{card.name}` does not "
            f"list under classes ({', '.join(classes)})"
        )
    return np.array([codes[str(value)] for value in values.tolist()], np.int64), classes


def read_numbers(
    rows: pa.Table, card: DatasetCard, label: str, reduce: Reduce | None = None
) -> np.ndarray:
    """A number of each row, float32.

    Raises:
        DataError: a row has no label, or the column holds no numbers.
    """
    values, kind = _known(rows, card, label), rows[label].type
    if reduce and pa.types.is_list(kind) and not pa.types.is_string(kind.value_type):
        if empty := sum(len(one) == 0 for one in values):
            raise DataError(
                f"column `{label}` of `{card.name}`: expected a number or more in each row's "
                f"list, got {empty} empty ones; filter them first"
            )
        values = np.array([one[-1] if reduce == "last" else one.mean() for one in values])
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise DataError(
            f"column `{label}` of `{card.name}`: expected finite numbers, got "
            f"{kind}; choose a column of numbers, or use task=classification"
        )
    return values.astype(np.float32)


def read_lists(rows: pa.Table, card: DatasetCard, label: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Several labels a row: 1 where one applies, float32 ``[adapters, labels]``, and their names.

    Raises:
        DataError: a row has no list, or a column holds something else.
    """
    name, *more = columns_of(rows, label)
    if more:
        return _flags(rows, card, (name, *more)), (name, *more)
    values, kind = _known(rows, card, name), rows[name].type
    if not (pa.types.is_list(kind) and pa.types.is_string(kind.value_type)):
        raise DataError(
            f"column `{name}` of `{card.name}`: expected lists of text, got {kind}; write "
            'lists such as ["cat", "red"], name several columns of 0 and 1 as --label cat,red, '
            "or use --task classification"
        )
    lists = [sorted(set(labels)) for labels in values]
    names = sorted(set(chain.from_iterable(lists)))
    places = {label: place for place, label in enumerate(names)}
    found = np.zeros((len(lists), len(names)), np.float32)
    for row, labels in zip(found, lists, strict=True):
        row[[places[label] for label in labels]] = 1
    return found, tuple(names)


def _flags(rows: pa.Table, card: DatasetCard, columns: Sequence[str]) -> np.ndarray:
    """Columns of 0 and 1, ``[adapters, columns]``."""
    found = np.stack([read_numbers(rows, card, name) for name in columns], axis=1)
    if wrong := set(np.unique(found).tolist()) - {0.0, 1.0}:
        raise DataError(
            f"label: expected 0 and 1 in each of {', '.join(columns)}, got {min(wrong):g}; "
            "leave that column out"
        )
    return found


def _known(rows: pa.Table, card: DatasetCard, name: str) -> np.ndarray:
    values = read_column(rows, card, name)
    if rows[name].null_count:
        raise DataError(f"column `{name}` has rows without a label; filter them first")
    return values
