"""Labels that a table beside the card gives to the values of a column."""

import csv
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.errors import DataError


def join_labels(adapters: AdapterSet, folder: Path) -> AdapterSet:
    """Add the columns of lists that the card's ``label_from`` names, those that are missing.

    Args:
        adapters: the adapters.
        folder: of the tables.

    Raises:
        DataError: a table is missing or damaged, or lacks a value of the rows.
    """
    rows = adapters.rows
    for name, table in adapters.card.label_from.items():
        if name in rows.column_names:
            continue
        held = read_labels(folder / table.file)
        values = [str(value) for value in adapters.column(table.column)]
        if lacking := sorted(set(values) - set(held)):
            raise DataError(
                f"{folder / table.file}: expected a row for each {table.column} of "
                f"`{adapters.card.name}`, got none for `{lacking[0]}`; add it"
            )
        lists = pa.array([held[value] for value in values], pa.list_(pa.string()))
        rows = rows.append_column(name, lists)
    return replace(adapters, rows=rows)


def read_labels(file: Path) -> dict[str, list[str]]:
    """Read which labels each value has.

    Args:
        file: a CSV with a header: values in the first column, then 0 or 1 for each label.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such table of labels, which the card names in label_from")
    with file.open(encoding="utf-8", newline="") as text:
        (_, *names), *lines = csv.reader(text)
    held = {}
    for number, (value, *flags) in enumerate(lines, start=2):
        if len(flags) != len(names) or set(flags) - {"0", "1"} or value in held:
            raise DataError(
                f"{file}, line {number}: expected a new value and {len(names)} times 0 or 1, got "
                f"`{','.join((value, *flags))}`"
            )
        held[value] = [name for name, flag in zip(names, flags, strict=True) if flag == "1"]
    return held
