"""Views of updates equal the dense computation, standardised or not."""

import numpy as np
import pytest
import torch
from tolerances import EXACT, rounding
from torch import Tensor

from lora_ws.functional.views import VIEWS, View, see, standardized_product

OUTPUTS, INPUTS, MODULES, N, Q, P = 24, 40, 2, 3, 5, 7
DENSE = {
    "update": lambda w: w,
    "transposed": lambda w: w.T,
    "left_gram": lambda w: w @ w.T,
    "right_gram": lambda w: w.T @ w,
}


def drawn(*shape: int, seed: int, mean: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape) + mean)


def dense(
    matrix: np.ndarray, probes: np.ndarray, projection: np.ndarray, eps: float | None
) -> np.ndarray:
    seen = matrix @ probes
    if eps is not None:
        seen = (seen - seen.mean()) / (seen.std(ddof=1) + eps)
    return projection.T @ seen


@pytest.mark.parametrize("eps", [None, 1e-8, 0.5])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_those_of_the_dense_update(name: str, rank: int, eps: float | None) -> None:
    view = VIEWS[name]  # type: ignore[index]
    up, down = drawn(N, MODULES, OUTPUTS, rank, seed=0), drawn(N, MODULES, rank, INPUTS, seed=1)
    rows, columns = view.sides(OUTPUTS, INPUTS)
    probes, projection = drawn(MODULES, columns, Q, seed=2), drawn(MODULES, rows, P, seed=3)
    got = see(up, down, view, probes, projection, eps=eps)
    assert got.shape == (N, MODULES, P, Q)
    for row in range(N):
        for module in range(MODULES):
            matrix = DENSE[name](up[row, module].numpy() @ down[row, module].numpy())
            wanted = dense(matrix, probes[module].numpy(), projection[module].numpy(), eps)
            atol = 1e-10 * np.abs(wanted).max()
            np.testing.assert_allclose(got[row, module].numpy(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("eps", [None, 1e-8])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_any_leading_axes(leading: tuple[int, ...], eps: float | None) -> None:
    view = View(transposed=True, gram=True)
    up, down = drawn(*leading, OUTPUTS, 2, seed=0), drawn(*leading, 2, INPUTS, seed=1)
    probes, projection = drawn(INPUTS, Q, seed=2), drawn(INPUTS, P, seed=3)
    got = see(up, down, view, probes, projection, eps=eps).reshape(-1, P, Q)
    flat = zip(up.reshape(-1, OUTPUTS, 2), down.reshape(-1, 2, INPUTS), strict=True)
    for mine, (b, a) in zip(got, flat, strict=True):
        alone = see(b[None], a[None], view, probes[None], projection[None], eps=eps)[0]
        torch.testing.assert_close(mine, alone, rtol=EXACT, atol=EXACT)


def test_standardising_in_float32_keeps_its_digits_where_the_mean_is_large() -> None:
    """Entries of 10 000 ± 100: a sum of squares less a square would keep none of the spread."""
    left, core = drawn(OUTPUTS, 1, seed=0, mean=100), drawn(1, Q, seed=1, mean=100)
    projection = drawn(OUTPUTS, P, seed=2)
    got = standardized_product(left.float(), core.float(), projection.float()).double()
    # What rounding the factors moves, a share of their mean over their spread.
    given = (left.float().double(), core.float().double(), projection.float().double())
    wanted = dense((given[0] @ given[1]).numpy(), np.eye(Q), given[2].numpy(), 1e-8)
    atol = rounding(OUTPUTS, size=float(np.abs(wanted).max())) * 100
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_of_zero_is_seen_as_zeros_and_has_gradients(dtype: torch.dtype) -> None:
    up = torch.zeros(1, OUTPUTS, 2, dtype=dtype, requires_grad=True)
    probes = drawn(1, OUTPUTS, Q, seed=2).to(dtype).requires_grad_()
    down, projection = drawn(1, 2, INPUTS, seed=1).to(dtype), drawn(1, OUTPUTS, P, seed=3).to(dtype)
    seen = see(up, down, VIEWS["left_gram"], probes, projection, eps=1e-8)
    assert (seen == 0).all()
    seen.sum().backward()
    for value in (up, probes):
        assert value.grad is not None
        assert value.grad.isfinite().all()
