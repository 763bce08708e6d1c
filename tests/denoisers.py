"""Denoisers small enough to know the truth, and measures of them that are linear or quadratic.

All of it in float64, where what must be equal is equal within `tolerances.EXACT`.
"""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_ws.concepts.objective import Objective


class Linear(nn.Module):
    """A denoiser whose prediction is linear in its weights: a sum of matrices times the latent."""

    def __init__(self, names: Sequence[str] = ("block",), width: int = 4) -> None:
        super().__init__()
        for name in names:
            part = nn.ModuleDict({"ff": nn.Linear(width, width, bias=False)})
            parent: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if step not in dict(parent.named_children()):
                    parent.add_module(step, nn.Module())
                parent = parent.get_submodule(step)
            parent.add_module(last, part)
        self.double()

    def forward(self, z: Tensor, time: Tensor, encoder_hidden_states: Tensor) -> Any:
        said = [m(z.flatten(1)) for m in self.modules() if isinstance(m, nn.Linear)]
        return SimpleNamespace(sample=torch.stack(said).sum(0).view_as(z))


class Deep(nn.Module):
    """A denoiser with two matrices in a row: J is of the fourth degree in their size."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        layers = [nn.Linear(width, width, bias=False) for _ in range(2)]
        self.block = nn.ModuleDict({"ff": nn.Sequential(*layers)}).double()

    def forward(self, z: Tensor, time: Tensor, encoder_hidden_states: Tensor) -> Any:
        return SimpleNamespace(sample=self.block["ff"](z.flatten(1)).view_as(z))


class Sum(Objective):
    """A J that is linear in the weights of `Linear`, so that first order is all there is."""

    def _parts(self, unet: nn.Module) -> Iterator[Tensor]:
        said = unet(self.latents, self.times, **self.told).sample
        yield (said * self.against).sum()


def asking(kind: type[Objective] = Objective, sign: int = 1) -> Objective:
    """A measure on five random latents against five random constants."""
    draw = torch.Generator().manual_seed(0)
    latents, against = torch.randn(2, 5, 1, 2, 2, generator=draw).double()
    told = {"encoder_hidden_states": torch.zeros(1, 1, 1)}
    return kind(latents, torch.zeros(5, dtype=torch.long), told, against, sign)
