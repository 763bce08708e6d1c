"""What networks do to raw rows first: constants fitted on the training rows."""

from abc import ABC, abstractmethod
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_ws.adapters.layout import Layout
from lora_ws.functional.standardize import column_moments, safe_scale
from lora_ws.memory import BLOCK_BYTES


class Normalizer(nn.Module, ABC):
    """A map of rows whose constants are buffers, fitted once for all seeds."""

    @abstractmethod
    def fit(
        self, rows: Float[np.ndarray, "adapters params"], train: Int[np.ndarray, " chosen"]
    ) -> "Normalizer":
        """Fit the constants.

        Args:
            rows: of the whole collection, possibly a memory map.
            train: numbers of the training rows; others are not looked at.
        """

    @abstractmethod
    def forward(self, rows: Float[Tensor, "*some params"]) -> Float[Tensor, "*some params"]:
        """Normalize rows."""


@final
class ColumnScaler(Normalizer):
    """Standardises each column of features.

    Args:
        width: features per row.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(
        self, rows: Float[np.ndarray, "adapters features"], train: Int[np.ndarray, " chosen"]
    ) -> "ColumnScaler":
        """Take mean and standard deviation of each column; 1 where the latter is 0."""
        mean, std = column_moments(rows, rows=train)
        self.mean = torch.from_numpy(mean.astype(np.float32))
        self.scale = torch.from_numpy(safe_scale(std.astype(np.float32)))
        return self

    def select(self, columns: slice) -> "ColumnScaler":
        """The same for some of the columns."""
        part = ColumnScaler(len(self.mean[columns]))
        part.mean, part.scale = self.mean[columns], self.scale[columns]
        return part

    def forward(self, rows: Float[Tensor, "*some features"]) -> Float[Tensor, "*some features"]:
        """Subtract the mean and divide by the scale."""
        return (rows - self.mean) / self.scale


@final
class UpdateScaler(Normalizer):
    """Divides B of each layer by one number, so that the layer's updates have unit size.

    The number is the root mean square Frobenius norm of the layer's update ``B @ A`` over the
    training rows, which no change of basis ``B @ G, inv(G) @ A`` changes. Layers keep their
    proportions among adapters, and every declared symmetry of the network behind it.

    Args:
        layout: which columns are which factor.
    """

    scale: Tensor
    _divisor: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("scale", torch.ones(len(layout.layers)))
        # Of each column: 0 in A, and in B the layer, counted from 1.
        divisor = torch.zeros(layout.size, dtype=torch.long)
        for number, (_, _, up) in enumerate(layout.pairs()):
            divisor[up] = number + 1
        self.register_buffer("_divisor", divisor, persistent=False)

    def fit(
        self, rows: Float[np.ndarray, "adapters params"], train: Int[np.ndarray, " chosen"]
    ) -> "UpdateScaler":
        """Measure the updates, never formed: ``|BA|² = tr(BᵀB AAᵀ)``, in float64."""
        squares = np.zeros(len(self.layout.layers))
        step = max(1, BLOCK_BYTES // (8 * self.layout.size))
        for start in range(0, len(train), step):
            squares += self._squares(np.asarray(rows[train[start : start + step]], np.float64))
        norms = np.sqrt(squares / len(train)).astype(np.float32)
        self.scale = torch.from_numpy(safe_scale(norms))
        return self

    def forward(self, rows: Float[Tensor, "*some params"]) -> Float[Tensor, "*some params"]:
        """Divide every B."""
        divisors = torch.cat([torch.ones_like(self.scale[:1]), self.scale])
        return rows / divisors[self._divisor]

    def _squares(self, rows: Float[np.ndarray, "adapters params"]) -> Float[np.ndarray, " layers"]:
        """Sum over rows of the squared norms of each layer's update."""
        sums = []
        for layer, down, up in self.layout.pairs():
            a = rows[:, down].reshape(-1, *layer.down_shape)
            b = rows[:, up].reshape(-1, *layer.up_shape)
            sums.append(((b.mT @ b) * (a @ a.mT)).sum())
        return np.array(sums)
