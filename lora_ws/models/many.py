"""Many small networks as one: a step of all costs hardly more launches than a step of one."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import nn
from torch.nn import functional as F

from lora_ws.errors import ConfigError
from lora_ws.models.mlp import MLP


class ManyMLP(nn.Module):
    """Independent MLPs of one shape, their weights stacked as ``[models, inputs, outputs]``.

    Args:
        models: the networks; their weights are copied.

    Example:
        >>> many = ManyMLP(MLP(7, 10, hidden=[16]) for _ in range(3))
        >>> many(torch.zeros(2, 7)).shape
        torch.Size([3, 2, 10])
    """

    def __init__(self, models: Iterable[MLP]) -> None:
        super().__init__()
        states = [model.state_dict() for model in models]
        shapes = {tuple(tuple(v.shape) for v in state.values()) for state in states}
        if len(shapes) != 1:
            raise ConfigError(
                f"ManyMLP: expected networks of one shape, got {len(shapes)} shapes; stack each "
                "shape on its own"
            )
        stacks = [torch.stack(same) for same in zip(*(s.values() for s in states), strict=True)]
        self.weights = nn.ParameterList(w.transpose(1, 2).contiguous() for w in stacks[::2])
        self.biases = nn.ParameterList(b[:, None] for b in stacks[1::2])

    def __len__(self) -> int:
        return len(self.weights[0])

    def forward(
        self, x: Float[torch.Tensor, "*models rows features"]
    ) -> Float[torch.Tensor, "models rows classes"]:
        """Return logits of each model, on rows of its own or on rows shared by all."""
        x = x.expand(len(self), *x.shape[-2:])
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.relu(x) if layer else x, weight)
        return x

    def keep(self, models: Int[torch.Tensor, " kept"]) -> None:
        """Drop all models but these, in this order."""
        for parameter in self.parameters():
            parameter.data, parameter.grad = parameter.data[models], None

    def unstack(self, model: int) -> MLP:
        """One model as a network of its own, with a copy of the weights."""
        widths = [weight.shape[1] for weight in self.weights] + [self.weights[-1].shape[2]]
        with torch.device("meta"):
            alone = MLP(widths[0], widths[-1], widths[1:-1])
        layers = zip(self.weights, self.biases, strict=True)
        values = [v for w, b in layers for v in (w[model].T, b[model, 0])]
        copies = [v.detach().clone(memory_format=torch.contiguous_format) for v in values]
        alone.load_state_dict(dict(zip(alone.state_dict(), copies, strict=True)), assign=True)
        return alone
