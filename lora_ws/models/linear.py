"""A linear layer: softmax regression, or what scikit-learn's linear and kernel models fit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, final

import numpy as np

from lora_ws.functional.scores import check_state, perceptron
from lora_ws.models.base import Metanetwork, Outputs, scaled, scaler_shapes
from lora_ws.models.inputs import InputSpec

if TYPE_CHECKING:
    from lora_ws.models.linear_module import LinearModule


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
        from lora_ws.models.linear_module import LinearModule

        return LinearModule(self, inputs, outputs, normalize=self.normalize)

    def in_numpy(
        self, inputs: InputSpec, outputs: int, state: Mapping[str, np.ndarray]
    ) -> Outputs | None:
        """Multiply and add, in float64."""
        shapes = {"layer.weight": (outputs, inputs.width), "layer.bias": (outputs,)}
        check_state(state, shapes | (scaler_shapes(inputs) if self.normalize else {}))
        weights, biases = [state["layer.weight"]], [state["layer.bias"]]

        def score(rows: np.ndarray) -> np.ndarray:
            rows = rows.astype(np.float64)
            return perceptron(scaled(rows, state) if self.normalize else rows, weights, biases)

        return score
