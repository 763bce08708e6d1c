"""Collections from tables of arrow, pandas and `datasets`."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lora_ws.adapters.keys import parse_key
from lora_ws.adapters.layout import Layout
from lora_ws.collection.adapter_set import AdapterSet
from lora_ws.collection.beside import LABELS
from lora_ws.collection.card import DatasetCard
from lora_ws.collection.columns import lists_of
from lora_ws.collection.decode import OURS, decode_matrix, metadata_columns
from lora_ws.collection.shapes import first_shapes
from lora_ws.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


def adapters_from(
    table: "pa.Table | DataFrame | Dataset", card: DatasetCard | None = None
) -> AdapterSet:
    """Read a table of adapters, such as `AdapterSet.to_dataset` gives, or a published one.

    Args:
        table: of arrow, pandas or `datasets`; columns named ``unet.<path>.lora.down.weight`` and
            ``….up.weight`` hold the factors, all others are labels and metadata.
        card: what the collection is; by default one whose label is the column ``label`` or
            ``labels``, if the table has one.

    Raises:
        DataError: there are no such columns, or a row has another shape or no numbers.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> rows = pa.table({"category_label": ["cat", "dog"]})
        >>> adapters = AdapterSet(np.ones((2, layout.size), np.float32), layout, rows)
        >>> adapters_from(adapters.to_frame()).layout == layout
        True
    """
    batch = _arrow(table).combine_chunks()
    keys = {name: key for name in batch.column_names if (key := parse_key(name))}
    factors = {(k.path, k.role): name for name, k in keys.items() if k.role in ("down", "up")}
    if not factors or not batch.num_rows:
        raise DataError(
            "expected rows with columns such as `unet.<path>.lora.down.weight`, got "
            f"{batch.num_rows} rows of {', '.join(batch.column_names[:6])}"
        )
    columns = {key: batch[name].chunk(0) for key, name in factors.items()}
    rank = batch["rank"][0].as_py() if "rank" in batch.column_names else None
    layout = Layout.from_shapes(first_shapes(columns, rank))
    weights = np.empty((batch.num_rows, layout.size), np.float32)
    for matrix in layout.matrices:
        name = factors[matrix.layer.name, matrix.role]
        numbers = batch[name].chunk(0)
        for row, reason in decode_matrix(numbers, matrix.shape, weights[:, matrix.columns]).items():
            raise DataError(f"row {row}, column `{name}`: {reason}")
    rows = _metadata(batch, list(factors.values()))
    named = next((name for name in LABELS if name in rows.column_names), DatasetCard.label)
    return AdapterSet(weights, layout, rows, card or DatasetCard("unnamed", label=named))


def _arrow(table: Any) -> pa.Table:
    """One arrow table of whatever kind of table."""
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "with_format"):  # of `datasets`, which may hold only some of its rows
        return table.with_format("arrow")[:]
    if not hasattr(table, "to_dict"):
        kind = type(table).__name__
        raise DataError(f"expected a table of arrow, pandas or datasets, got {kind}")
    names = [name for name in map(str, table.columns) if parse_key(name)]
    rows = pa.Table.from_pandas(table.drop(columns=names), preserve_index=False)
    for name in names:
        cells = [np.asarray(cell) for cell in table[name]]
        alike = len({cell.shape for cell in cells}) == 1 and cells[0].ndim == 2
        lists = lists_of(np.stack(cells)) if alike else pa.array([cell.tolist() for cell in cells])
        rows = rows.append_column(name, lists)
    return rows


def _metadata(table: pa.Table, factors: list[str]) -> pa.Table:
    """Columns that hold no weights, under their own names."""
    batches = table.to_batches()
    rows = metadata_columns(batches[0], factors)
    if not rows.num_columns:
        return pa.table({"source": [f"row:{k}" for k in range(table.num_rows)]})
    names = {f"original_{name}": name for name in OURS}
    return rows.rename_columns([names.get(name, name) for name in rows.column_names])
