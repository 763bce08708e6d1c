"""The orthogonal matrix nearest to a matrix, in batches on torch."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor


def nearest_orthogonal(matrix: Float[Tensor, "*some n n"]) -> Float[Tensor, "*some n n"]:
    """Find the orthogonal matrices nearest to square matrices in the Frobenius norm.

    Of ``x.mT @ y`` it is the Q that minimises ``|x @ Q - y|`` (Schönemann 1966, "A generalized
    solution of the orthogonal Procrustes problem"). A singular matrix has several; it gives one of
    them, and no gradient in the directions that it leaves open.

    Example:
        >>> nearest_orthogonal(torch.tensor([[3.0, 0.0], [0.0, -0.5]])).tolist()
        [[1.0, 0.0], [0.0, -1.0]]
    """
    return _NearestOrthogonal.apply(matrix)[0]  # type: ignore[index]


@final
class _NearestOrthogonal(torch.autograd.Function):
    """The orthogonal factor of the polar decomposition, in float64, and its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, ...]:
        u, values, vh = torch.linalg.svd(matrix.double())
        return (u @ vh).to(matrix.dtype), u, values, vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        u, values, vh = ctx.saved_tensors
        turned = u.mT @ grads[0].double() @ vh.mT
        sums = values[..., :, None] + values[..., None, :]
        open_ = sums <= torch.finfo(ctx.dtype).eps * values[..., :1, None]
        turned = torch.where(open_, 0, (turned - turned.mT) / sums)
        return (u @ turned @ vh).to(ctx.dtype)
