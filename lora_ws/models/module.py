"""`MetanetModule`: the network that a `Metanetwork` builds, in torch."""

from abc import ABC, abstractmethod
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.models.inputs import InputSpec
from lora_ws.models.normalizers import ColumnScaler, Normalizer, UpdateScaler


class MetanetModule(nn.Module, ABC):
    """A network on rows: features ``[adapters, features]`` or weights ``[adapters, params]``.

    Args:
        inputs: what the rows are.

    Attributes:
        normalizer: what the network does to raw rows first. Its constants are fitted on training
            rows, shared by all seeds, and travel in the bundle.

    Example:
        >>> import torch
        >>> from lora_ws.models import MLP
        >>> MLP(hidden=(16,)).build(InputSpec(7), outputs=10)(torch.zeros(2, 7)).shape
        torch.Size([2, 10])
    """

    normalizer: Normalizer

    def __init__(self, inputs: InputSpec) -> None:
        super().__init__()
        self.normalizer = normalizer_for(inputs)

    @abstractmethod
    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Embed raw rows; abstention and maps of adapters look at these vectors."""

    @abstractmethod
    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Map embeddings to outputs: logits, or standardised numbers."""

    @final
    def forward(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs for raw rows."""
        return self.head(self.embed(rows))


def normalizer_for(inputs: InputSpec) -> Normalizer:
    """Scale the columns of features; of factors, the update of each layer."""
    if inputs.layout is None:
        return ColumnScaler(inputs.width)
    return UpdateScaler(inputs.layout)
