"""What networks share that a solver fits, not gradient descent."""

from abc import abstractmethod
from typing import final

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from lora_ws.models.base import Metanetwork
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule
from lora_ws.models.normalizers import Normalizer


class FittedModule(MetanetModule):
    """A network that normalizes rows and scores them; its embedding is the row itself.

    Args:
        network: the spec that builds it.
        inputs: what the rows are.

    Attributes:
        network: the spec that builds a module which takes this one's state dict, for bundles.
    """

    def __init__(self, network: Metanetwork, inputs: InputSpec) -> None:
        super().__init__(inputs)
        self.network = network

    def embed(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
        """Return the row."""
        return rows

    def head(self, embedding: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        """Normalize, and return a score per class."""
        return self.score(self.normalizer(embedding))

    @abstractmethod
    def score(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        """Score normalized rows: logits."""


@final
class Identity(Normalizer):
    """Leaves rows alone, such as kernel values, whose size means something."""

    def fit(
        self, rows: Float[np.ndarray, "adapters params"], train: Int[np.ndarray, " chosen"]
    ) -> "Identity":
        """Nothing to fit."""
        return self

    def forward(self, rows: Float[Tensor, "*some params"]) -> Float[Tensor, "*some params"]:
        """Return the rows."""
        return rows
