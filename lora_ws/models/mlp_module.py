"""What `MLP` builds, alone and stacked."""

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.models.inputs import InputSpec
from lora_ws.models.many import Stacked, check_one_shape
from lora_ws.models.module import MetanetModule


@final
class MLPModule(MetanetModule):
    """What `MLP` builds; its embedding is the row itself."""

    def __init__(self, inputs: InputSpec, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__(inputs)
        widths = [inputs.width, *hidden]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], outputs))

    def embed(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
        """Return the row."""
        return rows

    def head(self, embedding: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        """Standardise, and return outputs."""
        return self.layers(self.normalizer(embedding))


@final
class ManyMLP(Stacked[MLPModule]):
    """Independent MLPs of one shape, their weights stacked as ``[models, inputs, outputs]``.

    Args:
        modules: the networks; their weights are copied.

    Example:
        >>> from lora_ws.models import MLP
        >>> many = ManyMLP([MLP(hidden=(16,)).build(InputSpec(7), 10) for _ in range(3)])
        >>> many(torch.zeros(2, 7)).shape
        torch.Size([3, 2, 10])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, modules: Sequence[MLPModule]) -> None:
        super().__init__()
        check_one_shape(modules)
        states = [module.state_dict() for module in modules]
        layers = [name for name in states[0] if name.startswith("layers.")]
        stacks = [torch.stack([state[name] for state in states]) for name in layers]
        self.weights = nn.ParameterList(w.transpose(1, 2).contiguous() for w in stacks[::2])
        self.biases = nn.ParameterList(b[:, None] for b in stacks[1::2])
        for name in ("mean", "scale"):
            own = torch.stack([state[f"normalizer.{name}"] for state in states])[:, None]
            # Seeds of one experiment share it, so that rows shared by all are scaled once.
            self.register_buffer(name, own[:1] if (own == own[:1]).all() else own)

    def __len__(self) -> int:
        return len(self.weights[0])

    @property
    def width(self) -> int:
        """The widest layer."""
        return max(weight.shape[1] for weight in self.weights)

    def forward(
        self, rows: Float[Tensor, "*models rows features"]
    ) -> Float[Tensor, "models rows outputs"]:
        """Return outputs of each network, on rows of its own or on rows shared by all."""
        x = (rows - self.mean) / self.scale
        x = x.expand(len(self), *x.shape[-2:])
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.relu(x) if layer else x, weight)
        return x

    def keep(self, models: Int[Tensor, " kept"]) -> None:
        """Drop all networks but these, in this order."""
        for parameter in self.parameters():
            parameter.data, parameter.grad = parameter.data[models], None
        if len(self.mean) > 1:
            self.mean, self.scale = self.mean[models], self.scale[models]

    def unstack(self, model: int) -> MLPModule:
        """One network on its own, with a copy of the weights."""
        widths = [weight.shape[1] for weight in self.weights] + [self.weights[-1].shape[2]]
        with torch.device("meta"):
            alone = MLPModule(InputSpec(widths[0]), widths[-1], widths[1:-1])
        own = model if len(self.mean) > 1 else 0
        layers = zip(self.weights, self.biases, strict=True)
        values = [self.mean[own, 0], self.scale[own, 0]]
        values += [v for w, b in layers for v in (w[model].T, b[model, 0])]
        copies = [v.detach().clone(memory_format=torch.contiguous_format) for v in values]
        alone.load_state_dict(dict(zip(alone.state_dict(), copies, strict=True)), assign=True)
        return alone
