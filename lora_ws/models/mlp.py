"""The paper's classifier: a multi-layer perceptron with ReLU."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, final

import numpy as np

from lora_ws.errors import ConfigError
from lora_ws.functional.scores import check_state, perceptron
from lora_ws.models.base import Metanetwork, Outputs, scaled, scaler_shapes
from lora_ws.models.inputs import InputSpec

if TYPE_CHECKING:
    from lora_ws.models.mlp_module import ManyMLP, MLPModule
    from lora_ws.models.module import MetanetModule


@final
class MLP(Metanetwork):
    """Hidden layers of given widths with ReLU, then a linear layer (paper section 5.1: 3 x 512).

    Args:
        hidden: widths of the hidden layers; the paper's harmful-content classifier has 1024 each.

    Example:
        >>> import torch
        >>> MLP(hidden=(16,)).build(InputSpec(7), outputs=10)(torch.zeros(2, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, hidden: tuple[int, ...] = (512, 512, 512)) -> None:
        self.hidden = hidden

    def build(self, inputs: InputSpec, outputs: int) -> "MLPModule":
        """Make the network.

        Raises:
            ConfigError: a width is not positive.
        """
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigError(f"MLP(hidden={self.hidden}): expected positive widths; use (512,)")
        from lora_ws.models.mlp_module import MLPModule

        return MLPModule(inputs, outputs, self.hidden)

    def in_numpy(
        self, inputs: InputSpec, outputs: int, state: Mapping[str, np.ndarray]
    ) -> Outputs | None:
        """Scale the rows, and multiply and add."""
        widths, shapes = [inputs.width, *self.hidden, outputs], scaler_shapes(inputs)
        names = [f"layers.{2 * layer}" for layer in range(len(widths) - 1)]
        for name, (wide, narrow) in zip(names, pairwise(widths), strict=True):
            shapes |= {f"{name}.weight": (narrow, wide), f"{name}.bias": (narrow,)}
        check_state(state, shapes)
        weights, biases = (
            [state[f"{name}.{kind}"] for name in names] for kind in ("weight", "bias")
        )
        return lambda rows: perceptron(scaled(rows, state), weights, biases)

    def stack(self, modules: Sequence["MetanetModule"]) -> "ManyMLP":
        """Batched matrix products in place of `torch.vmap`."""
        from lora_ws.models.mlp_module import ManyMLP, MLPModule

        return ManyMLP([module for module in modules if isinstance(module, MLPModule)])
