"""A network that no part of the library knows: how large updates are, and where they write."""

from itertools import pairwise

import torch
from torch import nn

from lora_ws.models import InputSpec, MetanetModule, Metanetwork


class SizeNet(Metanetwork):
    """Reads how large the update of each module is, and which way it writes.

    Args:
        width: numbers of the embedding.
        depth: hidden layers.
    """

    reads = "factors"
    symmetries = frozenset({"gl", "sign", "negation"})

    def __init__(self, *, width: int = 32, depth: int = 1) -> None:
        self.width = width
        self.depth = depth

    def build(self, inputs: InputSpec, outputs: int) -> MetanetModule:
        """Make the network."""
        return SizeNetModule(inputs, outputs, self.width, self.depth)


class SizeNetModule(MetanetModule):
    """Per module the log of |BA|² and the profile of what it writes, then a small network."""

    def __init__(self, inputs: InputSpec, outputs: int, width: int, depth: int) -> None:
        super().__init__(inputs)
        self.groups = [
            (torch.tensor(group.down), torch.tensor(group.up)) for group in inputs.factors.groups()
        ]
        modules = sum(len(down) for down, _ in self.groups)
        written = sum(up.shape[0] * up.shape[1] for _, up in self.groups)
        widths = [modules + written, *[width] * depth]
        layers: list[nn.Module] = []
        for size, narrow in pairwise(widths):
            layers += [nn.Linear(size, narrow), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], outputs)

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        """Embed."""
        rows = self.normalizer(rows)
        parts = []
        for down, up in self.groups:
            a, b = rows[:, down], rows[:, up]  # [adapters, modules, rank, in], [..., out, rank]
            left = b @ (a @ a.mT)
            energy = (left * b).sum(-1)  # of each output of the update
            total = energy.sum(-1, keepdim=True).clamp(min=0)
            parts += [total.log1p().flatten(1), (energy / (total + 1e-8)).flatten(1)]
        return self.layers(torch.cat(parts, 1))

    def head(self, embedding: torch.Tensor) -> torch.Tensor:
        """Score the classes."""
        return self.output(embedding)
