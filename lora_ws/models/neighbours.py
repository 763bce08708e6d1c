"""The vote of the nearest training rows."""

from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_ws.errors import ConfigError
from lora_ws.models.base import Metanetwork
from lora_ws.models.fitted import FittedModule
from lora_ws.models.inputs import InputSpec


@final
class Neighbours(Metanetwork):
    """Vote of the k nearest of some rows that it holds.

    Tensors alone, to be filled by a fitted ``KNeighborsClassifier`` (see
    `lora_ws.models.estimators`); gradient descent has nothing to train here.

    Args:
        k: how many vote.
        vectors: how many rows it holds.
        p: of the distance: 2 Euclidean, 1 Manhattan.
        weights: ``uniform``, or ``distance``: the inverse of the distance; rows at distance 0
            then vote alone.

    Example:
        >>> network = Neighbours(k=3, vectors=5).build(InputSpec(7), outputs=2)
        >>> network(torch.zeros(2, 7)).exp().round()
        tensor([[1., 0.],
                [1., 0.]])
    """

    def __init__(
        self,
        *,
        k: int = 5,
        vectors: int = 0,
        p: float = 2.0,
        weights: Literal["uniform", "distance"] = "uniform",
    ) -> None:
        self.k = k
        self.vectors = vectors
        self.p = p
        self.weights = weights

    def build(self, inputs: InputSpec, outputs: int) -> "NeighboursModule":
        """Make the network, of zeros.

        Raises:
            ConfigError: there are fewer rows than shall vote.
        """
        if not 1 <= self.k <= self.vectors:
            raise ConfigError(
                f"Neighbours(k={self.k}, vectors={self.vectors}): expected k from 1 to vectors; "
                "it is what a fitted KNeighborsClassifier becomes "
                "(--model sklearn.neighbors.KNeighborsClassifier)"
            )
        return NeighboursModule(self, inputs, outputs)


@final
class NeighboursModule(FittedModule):
    """What `Neighbours` builds.

    Attributes:
        vectors: normalized rows ``[vectors, features]``.
        labels: class of each ``[vectors]``.
    """

    vectors: Tensor
    labels: Tensor

    def __init__(self, network: Neighbours, inputs: InputSpec, outputs: int) -> None:
        super().__init__(network, inputs)
        self.options = network
        self.outputs = outputs
        self.register_buffer("vectors", torch.zeros(network.vectors, inputs.width))
        self.register_buffer("labels", torch.zeros(network.vectors, dtype=torch.long))

    def score(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows classes"]:
        """Logarithm of each class's share of the votes, see `log_shares`."""
        # The faster way through inner products cancels where rows are near.
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(rows, self.vectors, self.options.p, compute_mode=exact)
        nearest = distances.topk(self.options.k, largest=False)
        votes = self._votes(nearest.values, self.labels[nearest.indices])
        return log_shares(votes / votes.sum(1, keepdim=True))

    def _votes(
        self, distances: Float[Tensor, "rows k"], labels: Int[Tensor, "rows k"]
    ) -> Float[Tensor, "rows classes"]:
        weights = torch.ones_like(distances)
        if self.options.weights == "distance":
            weights = 1 / distances
            same = weights.isinf()
            weights = torch.where(same.any(1, keepdim=True), same.to(weights), weights)
        votes = weights.new_zeros(len(weights), self.outputs)
        return votes.scatter_add(1, labels, weights)


def log_shares(shares: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows classes"]:
    """Logarithm of probabilities; what is 0 counts as eps, as in scikit-learn's ``log_loss``.

    Args:
        shares: from 0 to 1.

    Example:
        >>> log_shares(torch.tensor([[1.0, 0.0]])).round()
        tensor([[  0., -16.]])
    """
    return shares.clamp(min=torch.finfo(shares.dtype).eps).log()
