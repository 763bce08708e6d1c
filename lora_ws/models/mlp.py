"""The paper's classifier: a multi-layer perceptron with ReLU."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import nn


class MLP(nn.Module):
    """Hidden layers of given widths with ReLU, then a linear layer (paper section 5.1: 3 x 512).

    Args:
        in_features: length of the representation.
        num_classes: length of the output.
        hidden: widths of the hidden layers.

    Example:
        >>> MLP(7, 10)(torch.zeros(2, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, in_features: int, num_classes: int, hidden: Sequence[int] = (512, 512, 512)
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(
        self, x: Float[torch.Tensor, "rows features"]
    ) -> Float[torch.Tensor, "rows classes"]:
        """Return logits."""
        return self.layers(x)
