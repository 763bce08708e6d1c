"""Collections as tables of arrow, pandas and `datasets`: a column for each factor."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lora_ws.adapters.layout import Layout

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


def column_name(path: str, role: str) -> str:
    """Name of the column that holds a factor, as published collections spell it."""
    return f"unet.{path}.lora.{role}.weight"


def to_arrow(weights: np.ndarray, layout: Layout, rows: pa.Table) -> pa.Table:
    """Write the rows' columns, and one of fixed-size lists of lists for each factor."""
    table = rows
    for matrix in layout.matrices:
        factors = np.asarray(weights[:, matrix.columns]).reshape(-1, *matrix.shape)
        table = table.append_column(column_name(matrix.layer.name, matrix.role), lists_of(factors))
    return table


def lists_of(matrices: np.ndarray) -> pa.Array:
    """Write ``[rows, m, n]`` numbers as fixed-size lists of lists."""
    _, m, n = matrices.shape
    inner = pa.FixedSizeListArray.from_arrays(pa.array(matrices.ravel()), n)
    return pa.FixedSizeListArray.from_arrays(inner, m)


def to_frame(weights: np.ndarray, layout: Layout, rows: pa.Table) -> "DataFrame":
    """Write the rows' columns, and one of float32 matrices for each factor."""
    import pandas as pd

    frame = rows.to_pandas()
    factors = {
        column_name(m.layer.name, m.role): list(
            np.asarray(weights[:, m.columns]).reshape(-1, *m.shape)
        )
        for m in layout.matrices
    }
    return pd.concat([frame, pd.DataFrame(factors, index=frame.index)], axis=1)


def to_dataset(weights: np.ndarray, layout: Layout, rows: pa.Table) -> "Dataset":
    """Write what `to_arrow` does as a dataset of the Hugging Face library."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(to_arrow(weights, layout, rows)))
