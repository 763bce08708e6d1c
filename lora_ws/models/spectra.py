"""What networks over singular vectors and values of updates share."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.models.base import Symmetry

# What a network reads: what updates write, or also what they read.
Side = Literal["left", "both"]

# Of weights that read unit vectors: small, so that steps of an optimizer soon outgrow it.
START = 5e-3
# Beside a size of 1, what `UpdateScaler` makes of the usual one: smaller updates fade to none.
FLOOR = 1e-2


def log_sizes(values: Float[Tensor, "*some"]) -> Float[Tensor, "*some"]:
    """Logarithms of sizes of 0 or more, which 0.01 added to each keeps from below -4.6.

    Example:
        >>> log_sizes(torch.tensor([0.0, 1.0]))
        tensor([-4.6151,  0.0000])
    """
    return ((values + FLOOR) / (1 + FLOOR)).log()


def energy_shares(values: Float[Tensor, "*some rank"]) -> Float[Tensor, "*some rank"]:
    """Share of each singular value in the squared norm of the update; zeros for an update of 0.

    Example:
        >>> energy_shares(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.3600, 0.6400],
                [0.0000, 0.0000]])
    """
    energies = values.square()
    total = energies.sum(-1, keepdim=True)
    return energies / torch.where(total > 0, total, 1)


def symmetries_of(side: Side) -> frozenset[Symmetry]:
    """Of a network of updates: where one side alone is read, their sign does not show.

    Example:
        >>> sorted(symmetries_of("both"))
        ['gl', 'sign']
    """
    both: frozenset[Symmetry] = frozenset({"gl", "sign"})
    unsigned: frozenset[Symmetry] = frozenset({"negation"})
    return both | unsigned if side == "left" else both
