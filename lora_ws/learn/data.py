"""Features and labels as whole batches: no Python object for a single row."""

from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lora_ws.collection.splits import Split

EVAL_BYTES = 64 << 20


@dataclass
class Batches:
    """Batches of some rows; each pass shuffles anew when there is a generator.

    Attributes:
        features: ``[rows, features]``: a tensor in memory, or a memory map read row by row.
        labels: ``[rows]``.
        rows: which rows.
        size: rows to a batch.
        generator: source of the order, or None to keep the order.
    """

    features: Tensor | np.ndarray
    labels: Tensor
    rows: np.ndarray
    size: int
    generator: torch.Generator | None = None

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.from_numpy(self.rows)
        if self.generator is not None:
            rows = rows[torch.randperm(len(rows), generator=self.generator)]
        for part in rows.split(self.size):
            yield self._take(part), self.labels[part]

    def _take(self, rows: Tensor) -> Tensor:
        if isinstance(self.features, Tensor):
            return self.features.index_select(0, rows)
        return torch.from_numpy(self.features[rows.numpy()])


@dataclass
class Epoch:
    """All batches of an epoch as one item, which a training step takes at once."""

    batches: Batches

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        # An iterator, because Lightning would copy a dataclass to move it to a device.
        yield iter(self.batches)


class FeatureData(L.LightningDataModule):
    """The three parts of a featurized collection.

    Args:
        features: ``[rows, features]`` of the whole collection.
        labels: integer classes of its rows.
        split: which rows are which part.
        batch_size: rows of a training step.
        seed: of the order of training rows.
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        labels: np.ndarray,
        split: Split,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.features = features
        self.labels = torch.from_numpy(labels)
        self.split = split
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> Epoch:
        """Training rows in a fresh order every epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = self.split.train
        return Epoch(Batches(self.features, self.labels, rows, self.batch_size, generator))

    def val_dataloader(self) -> Batches:
        """Validation rows in order."""
        return self.part(self.split.val)

    def test_dataloader(self) -> Batches:
        """Test rows in order."""
        return self.part(self.split.test)

    def part(self, rows: np.ndarray) -> Batches:
        """Any rows in order, in batches of bounded size."""
        size = max(1, EVAL_BYTES // (4 * self.features.shape[1]))
        return Batches(self.features, self.labels, rows, size)
