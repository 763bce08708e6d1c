"""`lora-ws featurize`: a representation as a table."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from sklearn.base import TransformerMixin

from lora_ws.addresses import file_system, is_address
from lora_ws.audit.output import writing
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError, TrainingError
from lora_ws.featurizers import Featurizer, StatsLayerDense
from lora_ws.learn.features import open_data, represent, transform_here, with_layout
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.memory import blocks
from lora_ws.workers import current_engine

# Columns that say which file a row is of.
KEYS = ("source", "sha256")


def featurize(
    *,
    out: str,
    dataset: str = "lora-ws-mini",
    subset: str | None = None,
    label: str | None = None,
    featurizer: Featurizer | TransformerMixin | None = None,
    workers: int = 1,
) -> None:
    """Write a representation of a collection as .parquet or .npz.

    Each row has the source, sha256 and group of its adapter, its label, and its part of the split.

    Representations are fitted on the training rows, or on all rows of a collection without labels.

    Args:
        out: output file, .parquet or .npz; also at an address, such as s3://bucket/rows.parquet.
        dataset: a collection's name, or the folder of a store, also at an address.
        subset: subset of the collection; null takes the card's first.
        label: column to predict; null takes the card's.
        featurizer: the representation; null takes StatsLayerDense.
        workers: processes that transform blocks of 64 MiB of rows; one fits.
    """
    if not out.endswith((".parquet", ".npz")):
        raise ConfigError(f"--out: expected a name ending in .parquet or .npz, got `{out}`")
    if is_address(out):
        # What it needs is missed now, not after the work.
        file_system(out)
    else:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    adapters, _ = open_data(ExperimentSpec(dataset, subset))
    columns, train = _labels(adapters, label)
    columns = _keys(adapters) | columns
    fitted = with_layout(featurizer or StatsLayerDense(), adapters)
    transform = partial(_spread, _Rows(adapters.weights, dataset, subset), workers)
    features = represent(fitted, adapters.weights, train, transform=transform)
    names = [str(name) for name in fitted.get_feature_names_out()]
    with writing(out) as file:
        if out.endswith(".npz"):
            arrays: dict[str, Any] = {"features": features, "names": np.array(names), **columns}
            with file.open("wb") as opened:
                np.savez(opened, **arrays)
        else:
            _write_parquet(file, features, names, columns)
    Console().print(f"{out}: {features.shape[0]} adapters, {features.shape[1]} features")


@dataclass(frozen=True, eq=False)
class _Rows:
    """The weights of a collection, which another process opens itself instead of being sent."""

    weights: np.ndarray
    dataset: str
    subset: str | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.dataset, self.subset)


@lru_cache(maxsize=1)
def _opened(dataset: str, subset: str | None) -> _Rows:
    return _Rows(open_data(ExperimentSpec(dataset, subset))[0].weights, dataset, subset)


def _spread(
    rows: _Rows, workers: int, featurizer: Any, _weights: np.ndarray, parts: Iterable[Any]
) -> Iterator[np.ndarray]:
    """Transform parts of the rows, in order, by several processes."""
    call, batches = partial(_transformed, featurizer, rows), ([part] for part in parts)
    for found in current_engine().map_batches(call, batches, workers, _lost):
        yield from found


def _transformed(featurizer: Any, rows: _Rows, parts: list[Any]) -> list[np.ndarray]:
    return list(transform_here(featurizer, rows.weights, parts))


def _lost(_part: Any) -> np.ndarray:
    raise TrainingError("a process that transformed rows ended; with fewer --workers memory may do")


def _keys(adapters: AdapterSet) -> dict[str, np.ndarray]:
    """Which file each row is of, and which rows a split keeps together, where this is known."""
    names = {name: name for name in KEYS if name in adapters.rows.column_names}
    if group := adapters.card.split.group:
        names["group"] = group
    return {key: adapters.column(name).astype(str) for key, name in names.items()}


def _labels(adapters: AdapterSet, label: str | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Label and part of each row, where the collection has labels, and the rows to fit on."""
    if label is None and not adapters.has_classes():
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
