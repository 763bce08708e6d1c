"""Modules of adapters seen through learned probes: what ProbeX and MVProbe have in common."""

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ws.errors import ConfigError
from lora_ws.functional.views import VIEWS, Seen, View, ViewName, look, see
from lora_ws.models.factors import FactorPair, Factors

Share = Literal["none", "shape"]
# Added to the spread of an update that the normalizer made of size 1.
EPS = 1e-12


@final
class ModuleProbes(nn.Module):
    """Looks at the update of each module through learned probes on both sides.

    Each factor is read once, through the probes of all views; what follows is as small as the
    probes are few, and runs for all modules at once.

    Args:
        factors: hands out the factors.
        views: what to look at, names of `functional.views.VIEWS`.
        probes: columns of U, and of P, per view.
        share: ``none`` gives each module probes of its own, ``shape`` those of one shape the same.
        standardize: whether what a view makes of the probes gets mean 0 and variance 1, which
            hides the size of the update.

    Raises:
        ConfigError: a view has no such name or comes twice, or there are none, or no probes.

    Example:
        >>> from lora_ws.adapters import Layout
        >>> factors = Factors(Layout.known("tiny_sd_qv"))
        >>> probes = ModuleProbes(factors, ("update", "left_gram"), probes=8)
        >>> probes(factors(torch.zeros(2, 7072))).shape
        torch.Size([2, 64, 128])
    """

    _outputs: Tensor
    _inputs: Tensor

    def __init__(
        self,
        factors: Factors,
        views: Sequence[ViewName],
        probes: int,
        *,
        share: Share = "none",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        known = bool(views) and set(views) <= set(VIEWS) and len(set(views)) == len(views)
        if not known or probes < 1 or share not in ("none", "shape"):
            raise ConfigError(
                f"expected views of {', '.join(VIEWS)}, each once, probes of at least 1 and share "
                f"of none or shape, got views={views}, probes={probes} and share={share}"
            )
        self.factors, self.eps = factors, EPS if standardize else None
        self.features = len(views) * probes**2
        self.columns, ups, downs = _columns(views, probes)
        self.up, self.down = nn.ParameterList(), nn.ParameterList()
        for shape in factors.shapes:
            own = (shape.modules,) if share == "none" else ()
            sides = ((self.up, shape.outputs, ups), (self.down, shape.inputs, downs))
            for held, width, count in sides:
                if count:
                    held.append(nn.Parameter(torch.randn(*own, width, count) / math.sqrt(width)))
        for name in ("outputs", "inputs"):
            widths = [float(getattr(s, name)) for s in factors.shapes for _ in range(s.modules)]
            self.register_buffer(f"_{name}", torch.tensor(widths)[:, None, None], persistent=False)

    def forward(self, pairs: Sequence[FactorPair]) -> Float[Tensor, "*some modules features"]:
        """Return what is seen of each module, in the layout's order."""
        up = _look([pair.up.mT for pair in pairs], self.up, self._outputs)
        down = _look([pair.down for pair in pairs], self.down, self._inputs)
        seen = [
            see(view, up, down, projection, probes, eps=self.eps).flatten(-2)
            for view, projection, probes in self.columns
        ]
        return self.factors.in_order([torch.cat(seen, -1)])


def _columns(
    views: Sequence[ViewName], probes: int
) -> tuple[list[tuple[View, slice, slice]], int, int]:
    """Of each view, its P and U among the probes of B and of A; and how many each of these has."""
    taken = {"up": 0, "down": 0}

    def take(side: str) -> slice:
        taken[side] += probes
        return slice(taken[side] - probes, taken[side])

    columns = []
    for view in (VIEWS[name] for name in views):
        left, right = ("down", "up") if view.transposed else ("up", "down")
        columns.append((view, take(left), take(left if view.gram else right)))
    return columns, taken["up"], taken["down"]


def _look(
    factors: Sequence[Tensor], probes: nn.ParameterList, width: Float[Tensor, "modules 1 1"]
) -> Seen:
    """Read a factor of all modules, those of one shape at once, without probes if none look."""
    own = list(probes) or [factor.new_zeros(factor.shape[-1], 0) for factor in factors]
    groups = [look(*each) for each in zip(factors, own, strict=True)]
    rank = max(factor.shape[-2] for factor in factors)

    def filled(values: Tensor, square: bool = False) -> Tensor:
        """With zeros for what another shape has of rank more."""
        more = rank - values.shape[-2]
        return F.pad(values, (0, more if square else 0, 0, more)) if more else values

    return Seen(
        torch.cat([filled(group.centred) for group in groups], -3),
        torch.cat([filled(group.gram, square=True) for group in groups], -3),
        torch.cat([filled(group.mean) for group in groups], -3),
        torch.cat([group.total.expand(group.mean.shape[-3], 1, -1) for group in groups]),
        width,
    )
