"""`lora-ws featurize`: a representation as a table."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from sklearn.base import TransformerMixin

from lora_ws.errors import ConfigError
from lora_ws.featurizers import StatsLayerDense
from lora_ws.learn.features import prepare
from lora_ws.learn.spec import ExperimentSpec


def featurize(
    *,
    out: Path,
    dataset: str = "lora-ws-mini",
    subset: str | None = None,
    label: str | None = None,
    featurizer: TransformerMixin | None = None,
) -> None:
    """Write a representation of a collection, with labels and split, as .parquet or .npz.

    Args:
        out: file to write, ending in .parquet or .npz.
        dataset: a collection's name, or the folder of a store.
        subset: a subset of it; null takes the card's first.
        label: column to predict; null takes the card's.
        featurizer: the representation; null takes StatsLayerDense.
    """
    if out.suffix not in (".parquet", ".npz"):
        raise ConfigError(f"--out: expected a name ending in .parquet or .npz, got `{out.name}`")
    chosen = featurizer or StatsLayerDense()
    prepared = prepare(ExperimentSpec(dataset, subset, label=label, featurizer=chosen))
    features = np.asarray(prepared.features)
    part = np.empty(len(features), object)
    for name, rows in prepared.split._asdict().items():
        part[rows] = name
    names = [str(name) for name in prepared.featurizer.get_feature_names_out()]
    label_names = np.array(prepared.classes)[prepared.labels]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(
            out,
            features=features,
            names=np.array(names),
            label=label_names,
            part=part.astype(str),
        )
    else:
        columns = {name: features[:, k] for k, name in enumerate(names)}
        pq.write_table(pa.table({"label": label_names, "part": part.astype(str), **columns}), out)
    Console().print(f"{out}: {features.shape[0]} adapters, {features.shape[1]} features")
