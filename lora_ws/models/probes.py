"""Modules of adapters seen through learned probes: what ProbeX and MVProbe have in common."""

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.errors import ConfigError
from lora_ws.functional.views import VIEWS, ViewName, see
from lora_ws.models.factors import FactorPair, Factors

Share = Literal["none", "shape"]
# Added to the spread of an update that the normalizer made of size 1.
EPS = 1e-12


@final
class ModuleProbes(nn.Module):
    """Looks at the update of each module through learned probes on both sides.

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
        self.factors = factors
        self.views, self.eps = tuple(views), EPS if standardize else None
        self.features = len(views) * probes**2
        self.probes, self.projections = nn.ParameterList(), nn.ParameterList()
        for shape in factors.shapes:
            own = (shape.modules,) if share == "none" else ()
            for view in views:
                rows, columns = VIEWS[view].sides(shape.outputs, shape.inputs)
                for held, width in ((self.probes, columns), (self.projections, rows)):
                    held.append(nn.Parameter(torch.randn(*own, width, probes) / math.sqrt(width)))

    def forward(self, pairs: Sequence[FactorPair]) -> Float[Tensor, "*some modules features"]:
        """Return what is seen of each module, in the layout's order."""
        each = zip(self.probes, self.projections, strict=True)
        groups = []
        for pair in pairs:
            seen = [
                see(*pair, VIEWS[view], *next(each), eps=self.eps).flatten(-2)
                for view in self.views
            ]
            groups.append(torch.cat(seen, -1))
        return self.factors.in_order(groups)
