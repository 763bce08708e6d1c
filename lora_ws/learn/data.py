"""Features and labels as whole batches: no Python object for a single row."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lora_ws.collection.splits import Split
from lora_ws.functional.rows import Rows
from lora_ws.learn.ranks import ALONE, Ranks
from lora_ws.memory import BLOCK_BYTES, blocks, held_bytes
from lora_ws.models import MetanetModule
from lora_ws.models.tokens import TokenModule

# Of rows on disk: those read together, which follow each other, and those shuffled together.
CHUNK_BYTES, SHUFFLED_BYTES = 1 << 20, 64 << 20
# Features or tokens of this rank's rows, their labels, and how many rows the batch has in all.
Batch = tuple[Tensor, Tensor, int]


@dataclass
class Batches:
    """Batches of some rows; each pass shuffles anew when there is a generator.

    Attributes:
        features: ``[rows, features]``: a tensor in memory, or a memory map read group by group; or
            tokens ``[rows, modules, features]`` in memory.
        labels: ``[rows]``.
        rows: which rows.
        size: rows to a batch of all ranks.
        generator: source of the order, or None to keep the order.
        ranks: who takes part; each reads its own rows of every batch.
    """

    features: Tensor | np.ndarray
    labels: Tensor
    rows: np.ndarray
    size: int
    generator: torch.Generator | None = None
    ranks: Ranks = ALONE

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        # Several batches are taken at a time.
        for group in self._order().split(self.size * self._together):
            parts = group.split(self.size)
            owned = [self._own(part) for part in parts]
            wanted, sizes = torch.cat(owned), [len(own) for own in owned]
            taken = self._take(wanted).split(sizes), self.labels[wanted].split(sizes)
            for rows, labels, part in zip(*taken, parts, strict=True):
                yield rows, labels, len(part)

    def _take(self, wanted: Tensor) -> Tensor:
        """Features of rows."""
        if isinstance(self.features, Tensor):
            return self.features.index_select(0, wanted)
        return torch.from_numpy(Rows(self.features, wanted.numpy())[:])

    @property
    def _together(self) -> int:
        """Batches that are taken together, and of many rows on disk shuffled together."""
        most = CHUNK_BYTES if isinstance(self.features, Tensor) else SHUFFLED_BYTES
        return max(1, most // (4 * prod(self.features.shape[1:]) * self.size))

    def _own(self, part: Tensor) -> Tensor:
        return part[self.ranks.rank :: self.ranks.world]

    def _order(self) -> Tensor:
        """The order of the rows; of more than may be held, chunks are shuffled, then their rows."""
        rows = torch.from_numpy(self.rows)
        if self.generator is None:
            return rows
        among = self.size * self._together
        if self.features.nbytes <= held_bytes() or len(rows) <= among:
            return rows[torch.randperm(len(rows), generator=self.generator)]
        chunks = rows.sort().values.split(max(1, CHUNK_BYTES // (4 * self.features.shape[1])))
        drawn = torch.randperm(len(chunks), generator=self.generator)
        whole = torch.cat([chunks[k] for k in drawn.tolist()])
        shuffled = [
            part[torch.randperm(len(part), generator=self.generator)] for part in whole.split(among)
        ]
        return torch.cat(shuffled)


@dataclass
class Epoch:
    """The batches of an epoch, in items that a training step takes at once.

    One rank takes all batches as one item. Several take one per step, because
    DistributedDataParallel is made ready for a single backward pass whenever a step begins.
    """

    batches: Batches

    def __len__(self) -> int:
        return len(self.batches) if self.batches.ranks.world > 1 else 1

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        # Iterators, because Lightning would copy a dataclass to move it to a device.
        if self.batches.ranks.world > 1:
            yield from (iter([batch]) for batch in self.batches)
        else:
            yield iter(self.batches)


def held(rows: Tensor | np.ndarray) -> Tensor:
    """Rows as a tensor: a copy of those of a mapped array, which torch must not write to."""
    return rows if isinstance(rows, Tensor) else torch.tensor(rows)


@torch.no_grad()
def read_once(network: MetanetModule, features: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Tokens of all rows ``[rows, modules, features]`` if no learned weight makes them.

    Args:
        network: what reads the rows.
        features: raw rows of the whole collection ``[rows, params]``.

    Returns:
        The features themselves for other networks, and where the tokens are too many to hold.
    """
    if not isinstance(network, TokenModule):
        return features
    first = network.tokenize(held(features[:1]))
    if len(features) * first.nbytes > held_bytes():
        return features
    tokens = first.new_empty(len(features), *first.shape[1:])
    for part in blocks(len(features), first.nbytes):
        tokens[part] = network.tokenize(held(features[part]))
    return tokens


class FeatureData(L.LightningDataModule):
    """The three parts of a featurized collection.

    Args:
        features: ``[rows, features]`` of the whole collection, or what `read_once` makes of it.
        labels: integer classes of its rows.
        split: which rows are which part.
        batch_size: rows of a training step.
        seed: of the order of training rows.
        ranks: who takes part.
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        labels: np.ndarray,
        split: Split,
        batch_size: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.features = features
        self.labels = torch.from_numpy(labels)
        self.split = split
        self.batch_size = batch_size
        self.ranks = ranks
        # All ranks draw the same order.
        self.order = torch.Generator().manual_seed(seed)

    def train_dataloader(self) -> Epoch:
        """Training rows in a fresh order every epoch."""
        return Epoch(self._batches(self.split.train, self.batch_size, self.order))

    def val_dataloader(self) -> Batches:
        """Validation rows in order."""
        return self.part(self.split.val)

    def test_dataloader(self) -> Batches:
        """Test rows in order."""
        return self.part(self.split.test)

    def part(self, rows: np.ndarray) -> Batches:
        """Any rows in order, in batches of bounded size."""
        size = max(1, BLOCK_BYTES // (4 * prod(self.features.shape[1:])))
        return self._batches(rows, size * self.ranks.world)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the order of the next epoch starts from, for a checkpoint."""
        return {"order": self.order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on with the order of a checkpoint."""
        self.order.set_state(state_dict["order"])

    def _batches(
        self, rows: np.ndarray, size: int, order: torch.Generator | None = None
    ) -> Batches:
        return Batches(self.features, self.labels, rows, size, order, self.ranks)
