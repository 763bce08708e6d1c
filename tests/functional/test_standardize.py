"""Column moments and scaling against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler
from tolerances import EXACT, rounding

from lora_ws.functional import column_moments, safe_scale, standardize


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block_rows", [1, 7, 128, 1000])
def test_agrees_with_standard_scaler(rng, dtype, block_rows):
    x = (rng.standard_normal((203, 2100)) * np.logspace(-4, 3, 2100) + 5).astype(dtype)
    scaler = StandardScaler().fit(x.astype(np.float64))
    mean, std = column_moments(x, block_rows=block_rows)
    # Merging a block takes four operations.
    bound = rounding(4 * len(x), dtype=np.float64)
    assert (np.abs(mean - scaler.mean_) <= bound * (np.abs(mean) + std)).all()
    # scikit-learn divides by n.
    np.testing.assert_allclose(std, scaler.scale_ * np.sqrt(203 / 202), rtol=EXACT)
    found = standardize(x, mean, safe_scale(std))
    assert found.dtype == dtype
    expected = scaler.transform(x.astype(np.float64)) * np.sqrt(202 / 203)
    # A difference and a quotient, both rounded.
    rtol = rounding(2) if dtype == np.float32 else EXACT
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=EXACT)


@given(
    value=st.floats(-(2.0**99), 2.0**99, width=32), rows=st.integers(1, 40), block=st.integers(1, 9)
)
@settings(max_examples=100, deadline=None)
def test_constant_columns_stay_exactly_zero(value, rows, block):
    for dtype in (np.float32, np.float64):
        x = np.full((rows, 2), dtype(value) * dtype(0.1))
        mean, std = column_moments(x, block_rows=block)
        np.testing.assert_array_equal(mean, x[0].astype(np.float64))
        np.testing.assert_array_equal(std, 0)
        np.testing.assert_array_equal(standardize(x, mean, safe_scale(std)), 0)


def test_merging_keeps_small_spreads_on_large_means(rng):
    x = 1e8 + rng.standard_normal((5000, 3))
    mean, std = column_moments(x, block_rows=11)
    centred = x - 1e8
    bound = rounding(len(x) // 11, size=1e8, dtype=np.float64)
    np.testing.assert_allclose(mean - 1e8, centred.mean(axis=0), rtol=0, atol=bound)
    np.testing.assert_allclose(std, centred.std(axis=0, ddof=1), rtol=EXACT)


def test_single_row_has_no_spread():
    mean, std = column_moments(np.array([[1.5, -2.0]]))
    np.testing.assert_array_equal(mean, [1.5, -2.0])
    np.testing.assert_array_equal(std, [0, 0])


def test_memory_map_and_slice(rng, tmp_path):
    x = rng.standard_normal((50, 40), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")[:, 5:30]
    for found, expected in zip(column_moments(mapped), column_moments(x[:, 5:30]), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert standardize(mapped, *column_moments(mapped)).shape == (50, 25)


def test_chosen_rows_only(rng):
    x = rng.standard_normal((60, 9), dtype=np.float32)
    rows = rng.permutation(60)[:41]
    for block_rows in (7, 128):
        chosen = column_moments(x, rows=rows, block_rows=block_rows)
        for found, expected in zip(
            chosen, column_moments(x[rows], block_rows=block_rows), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_safe_scale_replaces_what_cannot_divide():
    np.testing.assert_array_equal(safe_scale(np.array([0.0, 1e-310, 1e-300])), [1, 1, 1e-300])
    single = safe_scale(np.array([0.0, 1e-40, 2.0], np.float32))
    np.testing.assert_array_equal(single, np.float32([1, 1, 2]))
    assert single.dtype == np.float32


def test_input_is_left_alone(rng):
    x = rng.standard_normal((20, 4))
    before = x.copy()
    standardize(x, *column_moments(x))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("x", [np.ones(3), np.ones((0, 3))])
def test_column_moments_refuses_what_has_no_rows(x):
    with pytest.raises(ValueError, match="at least one row"):
        column_moments(x)


def test_column_moments_refuses_empty_blocks():
    with pytest.raises(ValueError, match="block_rows=0"):
        column_moments(np.ones((2, 2)), block_rows=0)


def test_standardize_refuses_other_widths():
    with pytest.raises(ValueError, match="fit them on data of the same width"):
        standardize(np.ones((2, 3)), np.ones(2), np.ones(3))
