"""Rows as factors, modules of one shape at once: what networks over factors start from."""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lora_ws.adapters.layout import Layout


class Shape(NamedTuple):
    """What the modules of a group have in common.

    Attributes:
        modules: how many they are.
        outputs: width of what they write, rows of B.
        inputs: width of what they read, columns of A.
        rank: of their updates.
    """

    modules: int
    outputs: int
    inputs: int
    rank: int


class FactorPair(NamedTuple):
    """Both factors of modules of one shape.

    Attributes:
        up: B ``[..., modules, outputs, rank]``.
        down: A ``[..., modules, rank, inputs]``.
    """

    up: Float[Tensor, "*some modules outputs rank"]
    down: Float[Tensor, "*some modules rank inputs"]

    @property
    def log_size(self) -> Float[Tensor, "*some modules"]:
        """``log(1 + |BA|²)``, which no split of an update into factors changes."""
        square = ((self.up.mT @ self.up) * (self.down @ self.down.mT)).sum((-2, -1))
        # Negative by rounding alone.
        return square.clamp(min=0).log1p()


@final
class Factors(nn.Module):
    """Hands out the factors in rows, the modules of one shape as one pair of arrays.

    A network keeps its parameters per group, ``[modules, ...]``, and needs one launch per group:
    six for the 64 modules of Stable Diffusion 1.5.

    Args:
        layout: which columns are which factor.

    Attributes:
        shapes: of each group, in the order of the pairs.

    Example:
        >>> factors = Factors(Layout.known("tiny_sd_qv"))
        >>> pairs = factors(torch.zeros(2, 7072))
        >>> pairs[0].up.shape, pairs[0].down.shape
        (torch.Size([2, 15, 32, 1]), torch.Size([2, 15, 1, 32]))
        >>> factors.in_order([pair.up.flatten(-2)[..., :8] for pair in pairs]).shape
        torch.Size([2, 64, 8])
    """

    _order: Tensor
    _columns: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        groups = layout.groups()
        self.shapes = tuple(
            Shape(
                len(g.layers), g.layers[0].out_features, g.layers[0].in_features, g.layers[0].rank
            )
            for g in groups
        )
        for number, group in enumerate(groups):
            for name, columns in (("down", group.down), ("up", group.up)):
                self.register_buffer(f"_{name}{number}", torch.tensor(columns), persistent=False)
        places = torch.tensor([place for group in groups for place in group.places])
        self.register_buffer("_order", places.argsort(), persistent=False)
        columns = [torch.tensor(c).flatten() for g in groups for c in (g.up, g.down)]
        self.register_buffer("_columns", torch.cat(columns).argsort(), persistent=False)

    def forward(self, rows: Float[Tensor, "*some params"]) -> list[FactorPair]:
        """Return the factors of each group."""
        return [
            FactorPair(self._taken(rows, f"_up{k}"), self._taken(rows, f"_down{k}"))
            for k in range(len(self.shapes))
        ]

    def to_rows(self, pairs: Sequence[FactorPair]) -> Float[Tensor, "*some params"]:
        """Put factors back into rows."""
        parts = [factor.flatten(-3) for pair in pairs for factor in pair]
        return torch.cat(parts, -1).index_select(-1, self._columns)

    def in_order(
        self, groups: Sequence[Shaped[Tensor, "*some _ features"]]
    ) -> Shaped[Tensor, "*some modules features"]:
        """Join what was made of each group, modules in the layout's order."""
        return torch.cat(list(groups), -2).index_select(-2, self._order)

    def _taken(self, rows: Float[Tensor, "*some params"], name: str) -> Tensor:
        columns = getattr(self, name)
        return rows.index_select(-1, columns.flatten()).unflatten(-1, columns.shape)
