"""Whitening against the inverse that it is a root of, and products without zeros against whole."""

import numpy as np
import pytest
from scipy.linalg import inv, sqrtm
from tolerances import EXACT

from lora_ws.errors import ConfigError
from lora_ws.functional.whitening import (
    PANEL,
    packed,
    packed_size,
    unpacked,
    whitened_rows,
    whitener,
)

WIDTHS = [1, 7, PANEL, PANEL + 1, 3 * PANEL - 5]


def moment_of(width: int, rank: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((rank, width))
    return rows.T @ rows


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rank", [1, 400])  # of next to no rank, and of all
@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
def test_whitened_products_are_those_of_the_symmetric_inverse_root(
    width: int, rank: int, shrinkage: float
) -> None:
    moment = moment_of(width, rank)
    shrunk = (1 - shrinkage) * moment * (width / np.trace(moment)) + shrinkage * np.eye(width)
    found = whitener(moment, shrinkage)
    np.testing.assert_array_equal(found, np.triu(found))
    root = inv(sqrtm(shrunk))
    rows = np.random.default_rng(1).standard_normal((5, width))
    expected = (rows @ root) @ (rows @ root).T
    # The inverse is at most 1 / shrinkage large.
    size = width / shrinkage
    np.testing.assert_allclose((rows @ found) @ (rows @ found).T, expected, atol=EXACT * size)


def test_whitener_of_full_shrinkage_and_of_nothing_is_the_identity() -> None:
    moment = np.diag([4.0, 1.0, 0.0])
    np.testing.assert_allclose(whitener(moment, 1.0), np.eye(3), atol=EXACT)
    np.testing.assert_array_equal(whitener(np.zeros((3, 3)), 0.1), np.eye(3))


@pytest.mark.parametrize("shrinkage", [0.0, -0.1, 1.5, float("nan")])
def test_shrinkage_out_of_range_is_refused(shrinkage: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and up to 1"):
        whitener(np.eye(3), shrinkage)


def test_shrinkage_that_rounding_hides_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 1e-17 for directions of 3 numbers; use 1e-6"):
        whitener(np.ones((3, 3)), 1e-17)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_with_panels_are_those_with_the_whole_matrix(
    width: int, rows: int, dtype: type
) -> None:
    random = np.random.default_rng(width)
    # Small integers, so that sums are exact in either precision.
    matrix = np.triu(random.integers(-3, 4, (width, width))).astype(dtype)
    some = random.integers(-3, 4, (rows, width)).astype(dtype)
    # Between others, so that it has to be found.
    others = [np.eye(3, dtype=dtype), np.eye(PANEL + 9, dtype=dtype)]
    matrices = [others[0], matrix, others[1]]
    widths = [len(one) for one in matrices]
    values = packed(iter(matrices), widths, dtype)
    assert len(values) == sum(map(packed_size, widths))
    for held in (values, np.concatenate([one.ravel() for one in matrices])):
        got = whitened_rows(some, unpacked(held, widths)[1])
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, some @ matrix)
