"""Changes of factors, against the updates formed in NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tolerances import EXACT
from torch import Tensor

from lora_ws.errors import ConfigError
from lora_ws.functional import perturb

RANKS = pytest.mark.parametrize("rank", [1, 2, 4, 8])
Move = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
SPLITS: dict[str, Move] = {
    "signs": perturb.flip_signs,
    "order": perturb.permute_ranks,
    "orthogonal": lambda b, a, rng: perturb.scramble_gauge(b, a, 1.0, rng),
    "condition 100": lambda b, a, rng: perturb.scramble_gauge(b, a, 100.0, rng),
}


def draw(rank: int, adapters: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rank)
    up = torch.randn(adapters, 5, 12, rank, generator=rng, dtype=torch.float64)
    return up, torch.randn(adapters, 5, rank, 10, generator=rng, dtype=torch.float64)


def update(up: Tensor, down: Tensor) -> np.ndarray:
    return np.einsum("nmor,nmri->nmoi", up.numpy(), down.numpy())


@RANKS
@pytest.mark.parametrize("name", SPLITS)
def test_other_splits_keep_the_update_and_change_the_factors(name: str, rank: int) -> None:
    up, down = draw(rank)
    moved = SPLITS[name](up, down, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(update(*moved), update(up, down), rtol=0, atol=100 * EXACT)
    if rank > 1 or name != "order":
        # Each adapter and module its own: no two changes agree.
        ratio = (moved[0] / up).reshape(15, -1)
        assert (ratio != 1).any()
        assert len({tuple(row.tolist()) for row in ratio}) > 1


def test_the_condition_is_that_of_the_change_of_basis() -> None:
    up, down = draw(4)
    moved, _ = perturb.scramble_gauge(up, down, 50.0, torch.Generator().manual_seed(0))
    basis = np.linalg.pinv(up.numpy()) @ moved.numpy()
    np.testing.assert_allclose(np.linalg.cond(basis), 50.0, rtol=1e-9)


@RANKS
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_truncation_is_the_truncated_singular_value_decomposition(rank: int, kept: int) -> None:
    up, down = draw(rank)
    u, s, v = np.linalg.svd(update(up, down))
    k = min(rank, kept)
    best = np.einsum("nmok,nmk,nmki->nmoi", u[..., :k], s[..., :k], v[..., :k, :])
    moved = perturb.truncate_rank(up, down, kept)
    np.testing.assert_allclose(update(*moved), best, rtol=0, atol=100 * EXACT)
    assert moved[0].shape == up.shape


def test_noise_has_the_size_it_says() -> None:
    up, down = 3 * torch.ones(2, 2, 4000, 2), 0.01 * torch.ones(2, 2, 2, 4000)
    moved = perturb.add_noise(up, down, 0.1, torch.Generator().manual_seed(0))
    for before, after in zip((up, down), moved, strict=True):
        spread = float((after - before).std() / before.square().mean().sqrt())
        # 32 000 draws: their deviation is known to within 2 % (five standard errors).
        assert abs(spread / 0.1 - 1) < 5 / np.sqrt(2 * before.numel())


def test_modules_are_dropped_whole_and_in_the_share_asked_for() -> None:
    up, down = torch.ones(2000, 5, 3, 2), torch.ones(2000, 5, 2, 4)
    moved = update(*perturb.drop_modules(up, down, 0.3, torch.Generator().manual_seed(0)))
    gone = (moved == 0).all((-2, -1))
    assert ((moved == 2).all((-2, -1)) | gone).all()
    assert abs(gone.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / gone.size)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_rounding_is_to_the_nearest_of_the_format(dtype: str, bits: int) -> None:
    up, down = draw(2)
    moved = perturb.round_to(up, down, dtype)  # type: ignore[arg-type]
    for before, after in zip((up, down), moved, strict=True):
        error = ((after - before) / before).abs().max()
        assert 0 < error <= 2.0**-bits


def test_what_makes_no_sense_is_refused() -> None:
    up, down = draw(2)
    with pytest.raises(ConfigError, match=r"condition: expected at least 1, got 0\.5"):
        perturb.scramble_gauge(up, down, 0.5, torch.Generator())
    with pytest.raises(ConfigError, match="rank: expected at least 1, got 0"):
        perturb.truncate_rank(up, down, 0)
