"""Views of updates equal the dense computation, standardised or not."""

import numpy as np
import pytest
import torch
from tolerances import EXACT, rounding
from torch import Tensor

from lora_ws.functional.views import VIEWS, look, see

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


def seen(
    up: Tensor, down: Tensor, name: str, probes: Tensor, projection: Tensor, eps: float | None
) -> Tensor:
    """The view, P and U among probes that it has no use for."""
    view = VIEWS[name]  # type: ignore[index]
    sides: list[list[Tensor]] = [[], []]
    places = []
    for place, columns in ((view.transposed, projection), (view.transposed == view.gram, probes)):
        sides[place].append(torch.ones_like(columns[..., :2]))
        start = sum(held.shape[-1] for held in sides[place])
        sides[place].append(columns)
        places.append(slice(start, start + columns.shape[-1]))
    factors = [up.mT, down]
    none = [factor.new_zeros(factor.shape[-1], 0) for factor in factors]
    mine = [torch.cat(side, -1) if side else no for side, no in zip(sides, none, strict=True)]
    first, second = (look(*each) for each in zip(factors, mine, strict=True))
    return see(view, first, second, places[0], places[1], eps=eps)


def widths(name: str) -> tuple[int, int]:
    """Rows and columns of the matrix of a view."""
    rows, columns = DENSE[name](np.zeros((OUTPUTS, INPUTS))).shape
    return rows, columns


@pytest.mark.parametrize("eps", [None, 1e-8, 0.5])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_those_of_the_dense_update(name: str, rank: int, eps: float | None) -> None:
    up, down = drawn(N, MODULES, OUTPUTS, rank, seed=0), drawn(N, MODULES, rank, INPUTS, seed=1)
    rows, columns = widths(name)
    probes, projection = drawn(MODULES, columns, Q, seed=2), drawn(MODULES, rows, P, seed=3)
    got = seen(up, down, name, probes, projection, eps)
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
    up, down = drawn(*leading, OUTPUTS, 2, seed=0), drawn(*leading, 2, INPUTS, seed=1)
    probes, projection = drawn(INPUTS, Q, seed=2), drawn(INPUTS, P, seed=3)
    got = seen(up, down, "right_gram", probes, projection, eps).reshape(-1, P, Q)
    flat = zip(up.reshape(-1, OUTPUTS, 2), down.reshape(-1, 2, INPUTS), strict=True)
    for mine, (b, a) in zip(got, flat, strict=True):
        alone = seen(b[None], a[None], "right_gram", probes[None], projection[None], eps)[0]
        torch.testing.assert_close(mine, alone, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", VIEWS)
def test_standardising_in_float32_keeps_its_digits_where_the_mean_is_large(name: str) -> None:
    """Entries of a million ± 1 % of it: a sum of squares less a square keeps none of that."""
    up = drawn(1, OUTPUTS, 1, seed=0, mean=100).float()
    down = drawn(1, 1, INPUTS, seed=1, mean=100).float()
    rows, columns = widths(name)
    probes, projection = drawn(1, columns, Q, seed=2).float(), drawn(1, rows, P, seed=3).float()
    got = seen(up, down, name, probes, projection, 1e-8)[0].double()
    exact = [value[0].double().numpy() for value in (up, down, probes, projection)]
    wanted = dense(DENSE[name](exact[0] @ exact[1]), exact[2], exact[3], 1e-8)
    # What rounding a mean of 100 moves in a spread of 1.
    atol = rounding(OUTPUTS + INPUTS, size=float(np.abs(wanted).max())) * 100
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_of_zero_is_seen_as_zeros_and_has_gradients(dtype: torch.dtype) -> None:
    up = torch.zeros(1, OUTPUTS, 2, dtype=dtype, requires_grad=True)
    probes = drawn(1, OUTPUTS, Q, seed=2).to(dtype).requires_grad_()
    down, projection = drawn(1, 2, INPUTS, seed=1).to(dtype), drawn(1, OUTPUTS, P, seed=3).to(dtype)
    found = seen(up, down, "left_gram", probes, projection, 1e-8)
    assert (found == 0).all()
    found.sum().backward()
    for value in (up, probes):
        assert value.grad is not None
        assert value.grad.isfinite().all()
