"""`FlatMLP`: an MLP in training with one vector of weights, and gradients written out."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from lora_ws.functional.perceptron import layer_gradients, layer_values
from lora_ws.models.mlp_module import MLPModule


@final
class FlatMLP:
    """The weights of an MLP side by side in a vector, and their gradients in another.

    The network's own parameters become views of them. It takes less time than autograd, because
    an optimizer passes over the vectors in one call, and no step asks for memory of their size.

    Args:
        network: stays as it is, but for where its parameters lie.

    Attributes:
        weights: what an optimizer steps; its ``grad`` is the vector of gradients.

    Example:
        >>> from lora_ws.models import MLP, InputSpec
        >>> network = MLP(hidden=(4,)).build(InputSpec(3), outputs=2)
        >>> flat = FlatMLP(network)
        >>> loss = flat.backward(torch.ones(5, 3), lambda outputs: outputs.square().sum())
        >>> torch.allclose(loss, network(torch.ones(5, 3)).square().sum())
        True
    """

    def __init__(self, network: MLPModule) -> None:
        self.network = network
        own = list(network.parameters())
        sizes = [one.numel() for one in own]
        self.weights = nn.Parameter(torch.cat([one.detach().flatten() for one in own]))
        self.weights.grad = torch.zeros_like(self.weights)
        values, gradients = (
            [part.view_as(one) for part, one in zip(vector.split(sizes), own, strict=True)]
            for vector in (self.weights.detach(), self.weights.grad)
        )
        for one, value, gradient in zip(own, values, gradients, strict=True):
            one.data, one.grad = value, gradient
        self._weights, self._biases = values[::2], values[1::2]
        self._gradients = list(zip(gradients[::2], gradients[1::2], strict=True))

    def backward(self, rows: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Write the gradients of a batch over those of the last.

        Args:
            rows: raw features ``[rows, features]``.
            loss_of: gives the loss of outputs ``[rows, outputs]``.

        Returns:
            The loss.
        """
        columns = self.network.normalizer(rows).T
        values = layer_values(columns, self._weights, self._biases)
        outputs = values[-1].T.requires_grad_()
        loss = loss_of(outputs)
        (errors,) = torch.autograd.grad(loss, outputs)
        layer_gradients(values, self._weights, errors.T, self._gradients)
        return loss.detach()
