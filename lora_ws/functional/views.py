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

`look` reads a factor once, through the probes of all views; `see` makes a view of that.
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


VIEWS: dict[ViewName, View] = {
    "update": View(transposed=False, gram=False),
    "transposed": View(transposed=True, gram=False),
    "left_gram": View(transposed=False, gram=True),
    "right_gram": View(transposed=True, gram=True),
}


class Seen(NamedTuple):
    """What views need to know of a factor, A or ``B^T``: a row per rank.

    The mean of each row is kept apart from the rest, so that no sum cancels where it is large.

    Attributes:
        centred: the rows less their means, times the probes ``[..., rank, probes]``.
        gram: inner products of the rows less their means ``[..., rank, rank]``.
        mean: of each row ``[..., rank, 1]``.
        total: sum of each probe ``[..., 1, probes]``.
        width: entries of a row; ``[modules, 1, 1]`` where modules differ.
    """

    centred: Float[Tensor, "*some rank probes"]
    gram: Float[Tensor, "*some rank rank"]
    mean: Float[Tensor, "*some rank 1"]
    total: Float[Tensor, "*shared 1 probes"]
    width: int | Float[Tensor, "modules 1 1"]

    def through(self, probes: slice) -> Float[Tensor, "*some rank taken"]:
        """The factor times some of the probes."""
        return self.centred[..., probes] + self.mean * self.total[..., probes]

    def products(self) -> Float[Tensor, "*some rank rank"]:
        """Inner products of the rows."""
        return self.gram + self.width * self.mean @ self.mean.mT


def look(
    factor: Float[Tensor, "*some rank width"], probes: Float[Tensor, "*shared width count"]
) -> Seen:
    """Read a factor through probes.

    Args:
        factor: A, or ``B^T``.
        probes: one matrix, or one for each module, the last of the leading axes.

    Example:
        >>> seen = look(torch.zeros(2, 64, 1, 7), torch.zeros(64, 7, 3))
        >>> seen.through(slice(2)).shape, seen.products().shape
        (torch.Size([2, 64, 1, 2]), torch.Size([2, 64, 1, 1]))
    """
    mean = factor.mean(-1, keepdim=True)
    centred = factor - mean
    return Seen(
        project(centred, probes),
        centred @ centred.mT,
        mean,
        probes.sum(-2, keepdim=True),
        factor.shape[-1],
    )


def see(
    view: View, up: Seen, down: Seen, projection: slice, probes: slice, *, eps: float | None = None
) -> Float[Tensor, "*some p q"]:
    """Project what a view of an update makes of probes: ``P^T M U``.

    Args:
        view: which M to look at.
        up: ``B^T`` through probes.
        down: A through probes.
        projection: which of the probes of L are P.
        probes: which are U, of the probes of L for a Gram matrix, else of those of R.
        eps: where given, ``M U`` is standardised before it is projected: mean 0 and unbiased
            variance 1 over its entries, with eps added to the standard deviation.

    Example:
        >>> up = look(torch.randn(2, 64, 1, 5), torch.randn(64, 5, 4))
        >>> down = look(torch.randn(2, 64, 1, 7), torch.randn(64, 7, 3))
        >>> see(VIEWS["update"], up, down, slice(4), slice(3)).shape
        torch.Size([2, 64, 4, 3])
    """
    left, right = (down, up) if view.transposed else (up, down)
    core = right.products() @ left.through(probes) if view.gram else right.through(probes)
    if eps is None:
        return outer(left.through(projection), core)
    return _standardized(left, projection, core, eps)


def project(
    factor: Float[Tensor, "*some rank width"], probes: Float[Tensor, "*shared width count"]
) -> Float[Tensor, "*some rank count"]:
    """Multiply factors of many adapters by probes that they share, which are not copied.

    Args:
        factor: A, or ``B^T``.
        probes: one matrix, or one for each module, the last of the leading axes.

    Example:
        >>> project(torch.zeros(2, 64, 1, 7), torch.zeros(64, 7, 3)).shape
        torch.Size([2, 64, 1, 3])
    """
    if probes.ndim == 2:
        return factor @ probes
    return torch.einsum("...mrw,mwc->...mrc", factor, probes)


def outer(
    first: Float[Tensor, "*some rank p"], second: Float[Tensor, "*some rank q"]
) -> Float[Tensor, "*some p q"]:
    """Sum the outer products of the rows of two matrices: ``first^T second``.

    Example:
        >>> outer(torch.ones(2, 64, 1, 3), torch.ones(2, 64, 1, 5)).shape
        torch.Size([2, 64, 3, 5])
    """
    # Matrix products of one term each are slow.
    return first.mT * second if first.shape[-2] == 1 else first.mT @ second


def _standardized(
    left: Seen, projection: slice, core: Float[Tensor, "*some rank q"], eps: float
) -> Float[Tensor, "*some p q"]:
    """``P^T (L Z - mean) / (std + eps)`` over the entries of ``L Z``; zeros for a product of zero.

    The mean of a product is the product of the means m of the factors. With both centred, the rest
    falls into three parts that are orthogonal to each other, so that their squares add up::

        L Z - mean  =  Lc Zc  +  (Lc mZ) 1^T  +  1 (mL^T Zc)
    """
    rows, columns = left.width, core.shape[-1]
    mean = core.mean(-1, keepdim=True)
    centred = core - mean
    across = left.mean.mT @ centred
    squares = (
        (centred * (left.gram @ centred)).sum((-2, -1), keepdim=True)
        + columns * (mean * (left.gram @ mean)).sum((-2, -1), keepdim=True)
        + rows * across.square().sum(-1, keepdim=True)
    )
    # The floor only keeps the root's slope finite at a product of zero.
    std = (squares / (rows * columns - 1)).clamp(min=torch.finfo(core.dtype).tiny).sqrt() + eps
    projected = outer(left.centred[..., projection], core / std)
    return projected + left.total[..., projection].mT * (across / std)
