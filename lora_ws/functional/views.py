"""A low-rank matrix seen through probes on both sides, without forming it.

The update ``W = B A`` of a module can be looked at in four ways, each a product ``L R`` of a tall
and a wide factor, or the Gram matrix of what that product writes:

=============  ==============  ======  ==========================  ===================
view           matrix M        L       core Z, so that M U = L Z   in the paper's code
=============  ==============  ======  ==========================  ===================
`update`       ``W``           ``B``   ``A U``                     ``xu``
`transposed`   ``W^T``         ``A^T`` ``B^T U``                   ``xtu``
`left_gram`    ``W W^T``       ``B``   ``(A A^T) (B^T U)``         ``xxtu``
`right_gram`   ``W^T W``       ``A^T`` ``(B^T B) (A U)``           ``xtxu``
=============  ==============  ======  ==========================  ===================

`update` alone is the probe of ProbeX; all four, standardised, are those of MVProbe, whose names for
them are in the last column. The left Gram matrix depends on what an update writes, the right one on
what it reads; neither on its sign.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ViewName = Literal["update", "transposed", "left_gram", "right_gram"]


class View(NamedTuple):
    """How to look at an update.

    Attributes:
        transposed: at ``W^T`` in place of W.
        gram: at the Gram matrix of what that writes.
    """

    transposed: bool
    gram: bool

    def sides(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Rows and columns of the matrix that is seen of an update ``[outputs, inputs]``.

        Example:
            >>> VIEWS["right_gram"].sides(5, 7)
            (7, 7)
        """
        rows, columns = (inputs, outputs) if self.transposed else (outputs, inputs)
        return rows, rows if self.gram else columns


VIEWS: dict[ViewName, View] = {
    "update": View(transposed=False, gram=False),
    "transposed": View(transposed=True, gram=False),
    "left_gram": View(transposed=False, gram=True),
    "right_gram": View(transposed=True, gram=True),
}


def see(
    up: Float[Tensor, "*some outputs rank"],
    down: Float[Tensor, "*some rank inputs"],
    view: View,
    probes: Float[Tensor, "*shared columns q"],
    projection: Float[Tensor, "*shared rows p"],
    *,
    eps: float | None = None,
) -> Float[Tensor, "*some p q"]:
    """Project what a view of an update makes of probes: ``projection^T M probes``.

    Costs O(rank (rows p + columns q)) a module; M ``[rows, columns]`` is never formed.

    Args:
        up: B.
        down: A.
        view: which M to look at; its `View.sides` are rows and columns.
        probes: U, which M is applied to; its leading axes end those of the factors.
        projection: P, through which the result is looked at.
        eps: where given, M U is standardised before it is projected: mean 0 and variance 1 over
            its entries, with eps added to the standard deviation.

    Example:
        >>> up, down = torch.randn(2, 64, 5, 1), torch.randn(2, 64, 1, 7)
        >>> probes, projection = torch.randn(64, 7, 3), torch.randn(64, 5, 4)
        >>> see(up, down, VIEWS["update"], probes, projection).shape
        torch.Size([2, 64, 4, 3])
    """
    left, right = (down.mT, up.mT) if view.transposed else (up, down)
    core = project(left.mT if view.gram else right, probes)
    if view.gram:
        core = (right @ right.mT) @ core
    if eps is None:
        return project(left.mT, projection).mT @ core
    return standardized_product(left, core, projection, eps=eps)


def standardized_product(
    left: Float[Tensor, "*some rows rank"],
    core: Float[Tensor, "*some rank q"],
    projection: Float[Tensor, "*shared rows p"],
    *,
    eps: float = 1e-8,
) -> Float[Tensor, "*some p q"]:
    """Standardise ``left @ core`` over its entries, and project it, without forming it.

    The mean of a product is the product of the means ``m`` of the factors, taken over rows of the
    one and columns of the other. With both centred, the rest falls into three parts that are
    orthogonal to each other, so that no sum cancels::

        L Z - mean  =  Lc Zc  +  (Lc mZ) 1^T  +  1 (mL^T Zc)

    Args:
        left: L.
        core: Z.
        projection: P; its leading axes end those of the factors.
        eps: added to the standard deviation, which is the unbiased one.

    Returns:
        ``P^T (L Z - mean) / (std + eps)``; zeros for a product of zero.

    Example:
        >>> left, core = torch.randn(5, 2), torch.randn(2, 3)
        >>> seen = standardized_product(left, core, torch.eye(5))
        >>> bool(seen.mean().abs() < 1e-6), round(seen.std().item(), 4)
        (True, 1.0)
    """
    rows, columns = left.shape[-2], core.shape[-1]
    left_mean, core_mean = left.mean(-2, keepdim=True), core.mean(-1, keepdim=True)
    left, core = left - left_mean, core - core_mean
    across = left_mean @ core
    gram = left.mT @ left
    squares = (core * (gram @ core)).sum((-2, -1)) + rows * across.square().sum((-2, -1))
    squares = squares + columns * (core_mean * (gram @ core_mean)).sum((-2, -1))
    # The floor only keeps the root's slope finite at a product of zero.
    std = (squares / (rows * columns - 1)).clamp(min=torch.finfo(left.dtype).tiny).sqrt()
    projected = project(left.mT, projection).mT @ (core + core_mean)
    projected = projected + projection.sum(-2)[..., None] * across
    return projected / (std + eps)[..., None, None]


def project(
    factor: Float[Tensor, "*some rank width"], probes: Float[Tensor, "*shared width count"]
) -> Float[Tensor, "*some rank count"]:
    """Multiply factors of many adapters by probes that they share, which are not copied.

    Args:
        factor: A, or ``B^T``.
        probes: one matrix, or one for each module.

    Example:
        >>> project(torch.zeros(2, 64, 1, 7), torch.zeros(64, 7, 3)).shape
        torch.Size([2, 64, 1, 3])
    """
    if probes.ndim == 2:
        return factor @ probes
    return torch.einsum("...mrw,mwc->...mrc", factor, probes)
