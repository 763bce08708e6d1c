"""A linear layer: softmax regression, or what scikit-learn's linear and kernel models fit."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.models.base import InputSpec, Metanetwork
from lora_ws.models.fitted import FittedModule, Identity


@final
class Linear(Metanetwork):
    """One linear layer on features.

    Args:
        normalize: standardise them first; kernel values, whose size means something, are not.

    Example:
        >>> import torch
        >>> Linear().build(InputSpec(7), outputs=10)(torch.zeros(2, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, normalize: bool = True) -> None:
        self.normalize = normalize

    def build(self, inputs: InputSpec, outputs: int) -> "LinearModule":
        """Make the network."""
        return LinearModule(self, inputs, outputs)


@final
class LinearModule(FittedModule):
    """What `Linear` builds; it can be trained by gradients too."""

    def __init__(self, network: Linear, inputs: InputSpec, outputs: int) -> None:
        super().__init__(network, inputs)
        if not network.normalize:
            self.normalizer = Identity()
        self.layer = nn.Linear(inputs.width, outputs)

    def score(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        """Multiply and add."""
        return self.layer(rows)
