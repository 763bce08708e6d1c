"""Products cut to a rank against numpy's dense singular values."""

import numpy as np
import pytest
from tolerances import EXACT, rounding

from lora_ws.errors import ConfigError
from lora_ws.functional.factors import cut_to_rank, orthonormal_rows, product_energy


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


def test_rows_of_any_condition_get_an_orthonormal_basis_in_either_precision() -> None:
    rng = np.random.default_rng(0)
    n, rank, width = 6, 4, 9
    rows = rng.standard_normal((n, rank, width))
    rows[1, 3] = rows[1, 0]  # deficient
    rows[2] = 0
    rows[3, 1] = rows[3, 0] + 1e-5 * rows[3, 1]  # nearly so
    rows[4] *= 1e-20
    rows[5] = rng.standard_normal((rank, rank)) @ rows[5]
    for dtype, bound in ((np.float64, EXACT), (np.float32, rounding(width))):
        given = rows.astype(dtype)
        for some in (given, given[:, :, :3]):  # more rows than columns too
            mixing, basis = orthonormal_rows(some)
            size = np.abs(some).max(axis=(1, 2), keepdims=True)
            assert (np.abs(mixing @ basis - some) <= bound * size).all()
            gram = basis @ basis.transpose(0, 2, 1)
            expected = np.broadcast_to(np.eye(basis.shape[1]), gram.shape)
            np.testing.assert_allclose(gram, expected, atol=bound)
            alone, _ = orthonormal_rows(some, basis=False)
            np.testing.assert_array_equal(alone, mixing)
