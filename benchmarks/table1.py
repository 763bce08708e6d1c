"""Table 1 on lora-ws-mini: five representations, several seeds each, from parquet to accuracies.

Compared, on the 500 adapters of ``shared/class``:

* ours: parquet read into a store, then `run_many` for every representation;
* published way: for every representation the rows are read anew through the datasets library in
  torch format, statistics taken matrix by matrix (updates B·A are formed), principal components by
  scikit-learn's incremental PCA, and each seed trained with a DataLoader of single rows, Adam's
  default implementation and a look at the loss and the accuracy after every step.

Both stop by the same rule; seeds start equal, but draw their orders differently, so the epochs
trained differ a little. Goal: at least 20 times faster.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
import stats_layer
import torch
from datasets import Dataset
from sklearn.decomposition import IncrementalPCA
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_ws import AdapterSet, FlatVec, FlatVecPCA, StatsFlatVec, StatsLayer, StatsLayerDense, load
from lora_ws.collection.ingest import import_collection
from lora_ws.learn.run import run_many
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.models import MLP, InputSpec
from lora_ws.zoo.publish import write_parquet

OURS = (FlatVec(), FlatVecPCA(), StatsFlatVec(), StatsLayer(), StatsLayerDense())


def statistics(values: torch.Tensor) -> torch.Tensor:
    """Seven statistics of each row, as torch reductions."""
    return torch.from_numpy(stats_layer.published(values.numpy(), [slice(None)]))


def flat_vec(matrices: list[torch.Tensor], _: np.ndarray) -> torch.Tensor:
    """All numbers of a row."""
    return torch.cat(matrices, 1)


def flat_vec_pca(matrices: list[torch.Tensor], train: np.ndarray) -> torch.Tensor:
    """Incremental principal components of standardised numbers."""
    rows = torch.cat(matrices, 1)
    rows = torch.nan_to_num((rows - rows[train].mean(0)) / rows[train].std(0))
    fitted = IncrementalPCA(200, batch_size=1024).fit(rows[train].numpy())
    return torch.from_numpy(fitted.transform(rows.numpy())).float()


def stats_flat_vec(matrices: list[torch.Tensor], _: np.ndarray) -> torch.Tensor:
    """Statistics of all numbers."""
    return statistics(torch.cat(matrices, 1))


def stats_by_layer(matrices: list[torch.Tensor], _: np.ndarray) -> torch.Tensor:
    """Statistics of every matrix."""
    return torch.cat([statistics(matrix) for matrix in matrices], 1)


def stats_layer_dense(matrices: list[torch.Tensor], _: np.ndarray) -> torch.Tensor:
    """Statistics of every update, formed."""
    pairs = zip(matrices[::2], matrices[1::2], strict=True)
    return torch.cat([statistics((b[:, :, None] * a[:, None]).flatten(1)) for a, b in pairs], 1)


PUBLISHED = (flat_vec, flat_vec_pca, stats_flat_vec, stats_by_layer, stats_layer_dense)


def read_rows(file: Path) -> list[torch.Tensor]:
    """Matrix columns through the datasets library, row by row in torch format."""
    rows = Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
    names = [name for name in rows.column_names if name.startswith("unet.")]
    names.sort()
    rows = rows.with_format("torch", columns=names)
    return [torch.stack([torch.as_tensor(row).flatten() for row in rows[name]]) for name in names]


def train_published(features: torch.Tensor, zoo: AdapterSet, seed: int) -> float:
    """One seed: the published loop."""
    labels, split = torch.from_numpy(zoo.labels()[0]), zoo.split()
    mean, std = features[split.train].mean(0), features[split.train].std(0)
    features = torch.nan_to_num((features - mean) / std)
    torch.manual_seed(seed)
    model = MLP().build(InputSpec(features.shape[1]), 10).layers
    optimizer, loss = torch.optim.Adam(model.parameters(), 1e-3), nn.CrossEntropyLoss()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    part = TensorDataset(features[split.train], labels[split.train])
    loader = DataLoader(part, batch_size=32, shuffle=True)
    best, bad = float("inf"), 0
    for _ in range(2000):
        hits = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            out = model(x)
            value = loss(out, y)
            value.backward()
            optimizer.step()
            hits += value.item() + (out.argmax(1) == y).float().mean().item()
        with torch.no_grad():
            val = loss(model(features[split.val]), labels[split.val]).item()
        plateau.step(val)
        best, bad = (val, 0) if val < best else (best, bad + 1)
        if bad >= 20:
            break
    with torch.no_grad():
        return float((model(features[split.test]).argmax(1) == labels[split.test]).float().mean())


def published(file: Path, zoo: AdapterSet, seeds: int) -> Callable[[], list[float]]:
    """The whole table, the published way."""

    def run() -> list[float]:
        found = []
        for represent in PUBLISHED:
            features = represent(read_rows(file), zoo.split().train)
            found += [train_published(features, zoo, seed) for seed in range(seeds)]
        return found

    return run


def ours(file: Path, zoo: AdapterSet, folder: Path, seeds: int) -> Callable[[], list[float]]:
    """The whole table, our way; the store is made anew each time."""
    turns = iter(range(1000))

    def run() -> list[float]:
        store = folder / f"store{next(turns)}"
        import_collection(file, store, card=replace(zoo.card, rows=0))
        spec = ExperimentSpec(dataset=str(store), subset="shared/class")
        found = []
        for featurizer in OURS:
            records = run_many(replace(spec, featurizer=featurizer), range(seeds))
            found += [record.test["accuracy"] for record in records]
        return found

    return run


def main() -> None:
    """Measure."""
    args = common.arguments(__doc__, repeats=1, seeds=10)
    seeds = 1 if args.quick else args.seeds
    zoo = load("lora-ws-mini", subset="shared/class")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (file,) = write_parquet(zoo, folder / "parquet").rglob("*.parquet")
        costs = common.alternate(
            {
                common.OURS: common.timed(ours(file, zoo, folder, seeds)),
                "published way": common.timed(published(file, zoo, seeds)),
            },
            args.repeats,
        )
    goal = [common.Goal("published way", 20)]
    common.show(f"Table 1, five representations, {seeds} seeds each", "s per table", costs, goal)
    common.facts("lightning", "datasets", n=len(zoo), seeds=seeds, repeats=args.repeats)


if __name__ == "__main__":
    main()
