"""`lora-ws featurize`: a representation as a table."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from sklearn.base import TransformerMixin

from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.featurizers import Featurizer, StatsLayerDense
from lora_ws.learn.features import open_data, represent, with_layout
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.memory import blocks

# Columns that say which file a row is of.
KEYS = ("source", "sha256")


def featurize(
    *,
    out: Path,
    dataset: str = "lora-ws-mini",
    subset: str | None = None,
    label: str | None = None,
    featurizer: Featurizer | TransformerMixin | None = None,
) -> None:
    """Write a representation of a collection as .parquet or .npz.

    Each row has the source, sha256 and group of its adapter, its label, and its part of the split.

    Representations are fitted on the training rows, or on all rows of a collection without labels.

    Args:
        out: output file, .parquet or .npz.
        dataset: a collection's name, or the folder of a store.
        subset: subset of the collection; null takes the card's first.
        label: column to predict; null takes the card's.
        featurizer: the representation; null takes StatsLayerDense.
    """
    if out.suffix not in (".parquet", ".npz"):
        raise ConfigError(f"--out: expected a name ending in .parquet or .npz, got `{out.name}`")
    adapters, _ = open_data(ExperimentSpec(dataset, subset))
    columns, train = _labels(adapters, label)
    columns = _keys(adapters) | columns
    fitted = with_layout(featurizer or StatsLayerDense(), adapters)
    features = represent(fitted, adapters.weights, train)
    names = [str(name) for name in fitted.get_feature_names_out()]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        arrays: dict[str, Any] = {"features": features, "names": np.array(names), **columns}
        np.savez(out, **arrays)
    else:
        _write_parquet(out, features, names, columns)
    Console().print(f"{out}: {features.shape[0]} adapters, {features.shape[1]} features")


def _keys(adapters: AdapterSet) -> dict[str, np.ndarray]:
    """Which file each row is of, and which rows a split keeps together, where this is known."""
    names = {name: name for name in KEYS if name in adapters.rows.column_names}
    if group := adapters.card.split.group:
        names["group"] = group
    return {key: adapters.column(name).astype(str) for key, name in names.items()}


def _labels(adapters: AdapterSet, label: str | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Label and part of each row, where the collection has labels, and the rows to fit on."""
    if label is None and adapters.card.label not in adapters.rows.column_names:
        return {}, np.arange(len(adapters))
    codes, classes = adapters.labels(label)
    split = adapters.split(label)
    part = np.empty(len(adapters), object)
    for name, rows in split._asdict().items():
        part[rows] = name
    return {"label": np.array(classes)[codes], "part": part.astype(str)}, split.train


def _write_parquet(
    out: Path, features: np.ndarray, names: list[str], columns: dict[str, np.ndarray]
) -> None:
    """Write row group by row group: a wide representation need not fit in memory twice."""
    writer = None
    for part in blocks(len(features), 4 * features.shape[1]):
        block = np.asfortranarray(features[part])
        table = pa.table(
            {
                **{name: values[part] for name, values in columns.items()},
                **{name: block[:, k] for k, name in enumerate(names)},
            }
        )
        writer = writer or pq.ParquetWriter(out, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()
