"""Singular value decompositions of products of two factors, never formed, in batches on torch."""

from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class Canonical(NamedTuple):
    """A product ``up @ down`` as ``left * values @ right.mT``, with orthonormal columns.

    Attributes:
        left: u, what is written ``[..., outputs, rank]``.
        values: singular values, descending ``[..., rank]``.
        right: v, what is read ``[..., inputs, rank]``.
    """

    left: Float[Tensor, "*some outputs rank"]
    values: Float[Tensor, "*some rank"]
    right: Float[Tensor, "*some inputs rank"]


def canonical_form(
    up: Float[Tensor, "*some outputs rank"], down: Float[Tensor, "*some rank inputs"]
) -> Canonical:
    """Decompose products of factors, by QR of each factor and an SVD of rank x rank in float64.

    The result depends on the product alone: not on its split into factors, and, where singular
    values differ, not on signs or order. The entry of largest magnitude in each u is positive.
    What is smaller than rounding of the factors' type, ``max(outputs, inputs) * eps`` of the
    largest value as in `numpy.linalg.matrix_rank`, is set to 0, u and v with it, so that factors
    padded with zeros, or of more columns than the product's rank, give zeros for the rest.

    Gradients are those of the decomposition; what is set to 0 has none, and no part has that of a
    rotation between equal singular values, which decide no directions.

    Args:
        up: B.
        down: A.

    Returns:
        The decomposition, in the factors' type and of their rank.

    Example:
        >>> up, down = torch.tensor([[-2.0], [0.0]]), torch.tensor([[3.0, 4.0]])
        >>> [part.flatten().tolist() for part in canonical_form(up, down)]
        [[1.0, 0.0], [10.0], [-0.6000000238418579, -0.800000011920929]]
    """
    return Canonical(*_CanonicalForm.apply(up, down))  # type: ignore[misc]


@final
class _CanonicalForm(torch.autograd.Function):
    """The decomposition and its derivative (Townsend 2016, "Differentiating the SVD")."""

    generate_vmap_rule = True

    @staticmethod
    def forward(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs, rank = up.shape[-2:]
        u, values, v = (_one if rank == 1 else _several)(up.double(), down.double().mT)
        rounding = max(outputs, down.shape[-1]) * torch.finfo(up.dtype).eps
        kept = values > rounding * values[..., :1]
        largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
        signs = torch.where(largest < 0, -1.0, 1.0) * kept[..., None, :]
        parts = u * signs, values * kept, v * signs
        # Factors with more columns than the product has rows decompose into fewer.
        lost = rank - values.shape[-1]
        whole = [F.pad(part, (0, lost)).to(up.dtype) for part in parts]
        return whole[0], whole[1], whole[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        up, down, u, values, v = (saved.double() for saved in ctx.saved_tensors)
        of_u, of_values, of_v = (grad.double() for grad in grads)
        inverse = torch.where(values > 0, 1 / values, 0)
        gaps = values[..., None, :].square() - values[..., :, None].square()
        least = torch.finfo(ctx.saved_tensors[0].dtype).eps * values[..., :1, None].square()
        turns = torch.where(gaps.abs() > least, 1 / gaps, 0)
        own, other = u.mT @ of_u, v.mT @ of_v
        core = turns * (own - own.mT) * values[..., None, :]
        core = core + values[..., :, None] * turns * (other - other.mT)
        core = core + torch.diag_embed(of_values * (values > 0))
        # The gradient of the product is `left @ v.mT + u @ right`.
        left = u @ core + (of_u - u @ own) * inverse[..., None, :]
        right = inverse[..., :, None] * (of_v - v @ other).mT
        of_up = left @ (v.mT @ down.mT) + u @ (right @ down.mT)
        of_down = (up.mT @ left) @ v.mT + (up.mT @ u) @ right
        dtype = ctx.saved_tensors[0].dtype
        return of_up.to(dtype), of_down.to(dtype)


def _several(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of ``up @ down.mT``."""
    written, left = torch.linalg.qr(up)
    read, right = torch.linalg.qr(down)
    u, values, vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
    return written @ u, values, read @ vh.mT


def _one(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a column each, which is a decomposition but for its lengths."""
    lengths = [torch.linalg.vector_norm(side, dim=-2, keepdim=True) for side in (up, down)]
    u, v = (side / torch.where(n > 0, n, 1) for side, n in zip((up, down), lengths, strict=True))
    return u, (lengths[0] * lengths[1]).squeeze(-2), v
