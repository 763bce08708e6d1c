"""Products cut to a rank against numpy's dense singular values."""

import numpy as np
import pytest
from tolerances import EXACT

from lora_ws.errors import ConfigError
from lora_ws.functional.factors import cut_to_rank, product_energy


def factors(r: int, outputs: int = 9, inputs: int = 7, seed: int = 0) -> tuple:
    random = np.random.default_rng(seed)
    return random.standard_normal((r, inputs)), random.standard_normal((outputs, r))


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (4, 1), (4, 3), (4, 4), (2, 5), (12, 2)])
def test_the_cut_is_the_best_of_its_rank(r: int, rank: int) -> None:
    down, up = factors(r)
    u, s, v = np.linalg.svd(up @ down, full_matrices=False)
    cut = cut_to_rank(down, up, rank)
    assert (cut.down.shape, cut.up.shape) == ((rank, 7), (9, rank))
    np.testing.assert_allclose(cut.up @ cut.down, (u[:, :rank] * s[:rank]) @ v[:rank], atol=EXACT)
    assert cut.whole == pytest.approx((s**2).sum())
    assert cut.kept == pytest.approx((s[:rank] ** 2).sum())
    assert product_energy(down, up) == pytest.approx((s**2).sum())


def test_another_split_of_the_product_gives_the_same_factors() -> None:
    down, up = factors(3)
    mixing = np.random.default_rng(1).standard_normal((3, 3))
    first = cut_to_rank(down, up, 3)
    for factor in (mixing, 1e6 * np.eye(3), -np.eye(3)):
        other = cut_to_rank(np.linalg.inv(factor) @ down, up @ factor, 3)
        np.testing.assert_allclose(other.down, first.down, atol=EXACT)
        np.testing.assert_allclose(other.up, first.up, atol=EXACT)


def test_nothing_stays_nothing() -> None:
    cut = cut_to_rank(np.zeros((2, 5)), np.ones((4, 2)), 3)
    assert not cut.down.any()
    assert not cut.up.any()
    assert (cut.kept, cut.whole) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [(np.ones((2, 3)), np.ones((3, 3))), (np.ones(3), np.ones((3, 3)))])
def test_shapes_that_do_not_fit_are_refused(bad: tuple) -> None:
    with pytest.raises(ConfigError, match="expected factors"):
        cut_to_rank(*bad, 1)
