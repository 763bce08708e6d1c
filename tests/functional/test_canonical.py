"""The canonical form equals numpy's decomposition of the update that is formed."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from tolerances import EXACT, rounding
from torch import Tensor

from lora_ws.functional.canonical import canonical_form
from lora_ws.functional.procrustes import nearest_orthogonal


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def factors(rank: int, outputs: int = 9, inputs: int = 12) -> tuple[Tensor, Tensor]:
    return draw(3, 2, outputs, rank), draw(3, 2, rank, inputs, seed=1)


def check_against_numpy(up: Tensor, down: Tensor, rank: int, tolerance: float = EXACT) -> None:
    left, values, right = (part.numpy() for part in canonical_form(up, down))
    u, s, vh = np.linalg.svd((up @ down).double().numpy())
    np.testing.assert_allclose(values[..., :rank], s[..., :rank], rtol=tolerance, atol=tolerance)
    assert (values[..., rank:] == 0).all()
    for mine, other in ((left, u), (right, vh.swapaxes(-1, -2))):
        assert (mine[..., rank:] == 0).all()
        cosines = np.abs((mine[..., :rank] * other[..., :rank]).sum(-2))
        np.testing.assert_allclose(cosines, 1, rtol=tolerance)
    np.testing.assert_allclose(
        left * values[..., None, :] @ right.swapaxes(-1, -2),
        (up @ down).numpy(),
        rtol=tolerance,
        atol=tolerance * np.abs(s).max(),
    )
    kept = left[..., :rank]
    assert (np.take_along_axis(kept, np.abs(kept).argmax(-2)[..., None, :], -2) > 0).all()


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_it_is_the_decomposition_of_the_dense_update(rank: int) -> None:
    check_against_numpy(*factors(rank), rank)


def test_more_columns_than_rows() -> None:
    check_against_numpy(*factors(8, outputs=5, inputs=6), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_padded_and_split_ranks_give_zeros(rank: int, dtype: torch.dtype) -> None:
    up, down = (part.to(dtype) for part in factors(rank))
    padded = torch.cat([up, torch.zeros_like(up)], -1), torch.cat([down, down], -2)
    mixing = draw(rank, 2 * rank, seed=2).to(dtype)
    spread = up @ mixing, torch.linalg.pinv(mixing) @ down
    # Of products of a dozen terms of at most 4, mixed by a matrix of condition below 10.
    tolerance = EXACT if dtype == torch.float64 else 10 * rounding(12 * 4 * 4)
    for pair in (padded, spread):
        check_against_numpy(*pair, rank, tolerance)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_nearly_parallel_factors_lose_no_small_value(condition: float) -> None:
    """Of ``B G, inv(G) A`` both factors are nearly parallel, and the update is that of ``B, A``."""
    up, down = factors(4)
    left, right = (torch.linalg.qr(draw(4, 4, seed=seed)).Q for seed in (3, 4))
    mixing = left * torch.logspace(0, np.log10(condition), 4, dtype=torch.float64) @ right
    mixed = canonical_form(up @ mixing, torch.linalg.solve(mixing, down))
    for mine, other in zip(mixed, canonical_form(up, down), strict=True):
        # Each factor is rounded on its own, and the other one multiplies what is lost.
        bound = 100 * condition * torch.finfo(torch.float64).eps
        torch.testing.assert_close(mine, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_are_those_of_differences(rank: int) -> None:
    up, down = (part[0].clone().requires_grad_() for part in factors(rank, 5, 4))
    torch.autograd.gradcheck(lambda b, a: tuple(canonical_form(b, a)), (up, down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_equal_values_have_finite_gradients(dtype: torch.dtype) -> None:
    up, down = torch.zeros(3, 6, 2, dtype=dtype), torch.zeros(3, 2, 5, dtype=dtype)
    up[1, 0, 0] = down[1, 0, 0] = 1
    up[2, :2], down[2, :, :2] = torch.eye(2), torch.eye(2)
    up.requires_grad_()
    down.requires_grad_()
    found = canonical_form(up, down)
    assert found.values.tolist() == [[0, 0], [1, 0], [1, 1]]
    sum(part.square().sum() for part in found).backward()  # type: ignore[union-attr]
    assert up.grad is not None
    assert up.grad.isfinite().all()
    assert down.grad is not None
    assert down.grad.isfinite().all()


def test_it_runs_under_vmap_and_its_gradient_behind_it() -> None:
    (up, down), (again, _) = factors(2), factors(2)
    up.requires_grad_()
    again.requires_grad_()

    def total(b: Tensor, a: Tensor) -> Tensor:
        left, values, right = canonical_form(b, a)
        return (left.sum(-2) * values * right.square().cumsum(-2).sum(-2)).sum()

    torch.vmap(total)(up, down).sum().backward()
    total(again, down).backward()
    torch.testing.assert_close(up.grad, again.grad, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_nearest_orthogonal_solves_procrustes(rank: int) -> None:
    x, y = draw(3, 9, rank), draw(9, rank, seed=1)
    found = nearest_orthogonal(x.mT @ y).numpy()
    for mine, own in zip(found, x.numpy(), strict=True):
        np.testing.assert_allclose(mine, orthogonal_procrustes(own, y.numpy())[0], atol=EXACT)


def test_nearest_orthogonal_has_the_gradient_of_differences() -> None:
    torch.autograd.gradcheck(nearest_orthogonal, (draw(2, 3, 3).requires_grad_(),))


def test_nearest_orthogonal_to_zero_is_orthogonal_and_has_no_gradient() -> None:
    zero = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    found = nearest_orthogonal(zero)
    torch.testing.assert_close(found.mT @ found, torch.eye(3).double().expand(2, 3, 3))
    found.sum().backward()
    assert zero.grad is not None
    assert (zero.grad == 0).all()
