"""Row statistics against numpy, scipy and torch, with their definitions converted."""

import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tolerances import EXACT

from lora_ws.functional import STATISTICS, summary_statistics
from lora_ws.functional.moments import product_moments


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def reference(x):
    """Column by column what the library promises, from other libraries, in float64."""
    wide, n = x.astype(np.float64), x.shape[1]
    constant = x.min(axis=1) == x.max(axis=1)
    std = np.where(constant, 0.0, wide.std(axis=1, ddof=1) if n > 1 else 0.0)
    ratio = (n - 1) / n
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # scipy divides by the biased deviation.
        kurtosis = (scipy.stats.kurtosis(wide, axis=1) + 3) * ratio**2 - 3
        skew = scipy.stats.skew(wide, axis=1) * ratio**1.5
    median = torch.from_numpy(np.ascontiguousarray(x)).median(dim=1).values.numpy()
    kurtosis, skew = (np.where(constant, 0.0, shape) for shape in (kurtosis, skew))
    columns = (wide.mean(axis=1), std, median, x.min(axis=1), x.max(axis=1), kurtosis, skew)
    return np.stack([column.astype(np.float64) for column in columns], axis=1)


def assert_matches(found, expected):
    np.testing.assert_array_equal(found[:, 2:5], expected[:, 2:5])
    spread = np.abs(expected[:, 3:5]).max(axis=1)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=EXACT, atol=EXACT * spread.max())
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=EXACT)
    np.testing.assert_allclose(found[:, 5:], expected[:, 5:], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 7), (300, 320), (9, 1281), (2, 300_001)])
def test_agrees_with_independent_references(rng, dtype, shape):
    x = (rng.standard_normal(shape) * 1e-3 + 2e-4).astype(dtype)
    assert_matches(summary_statistics(x), reference(x))


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.integers(1, 4), st.integers(1, 12)),
        elements=st.integers(-6, 6).map(lambda value: value / 2),
    )
)
@settings(max_examples=150, deadline=None)
def test_ties_constants_and_small_rows(x):
    assert_matches(summary_statistics(x), reference(x))


@pytest.mark.slow
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 9)),
        elements=st.floats(allow_nan=False, allow_infinity=False),
    )
)
@settings(max_examples=300, deadline=None)
def test_no_finite_float64_makes_nan(x):
    found = summary_statistics(x)
    assert np.isfinite(found).all()
    assert ((found[:, 3] <= found[:, 0]) & (found[:, 0] <= found[:, 4])).all()
    assert (found[x.min(axis=1) == x.max(axis=1)][:, [1, 5, 6]] == 0).all()


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(2, 9)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@settings(max_examples=200, deadline=None)
def test_float32_range_keeps_a_spread_wherever_values_differ(x):
    found = summary_statistics(x)
    assert np.isfinite(found).all()
    differs = x.min(axis=1) != x.max(axis=1)
    np.testing.assert_array_equal(found[:, 1] > 0, differs)


@pytest.mark.parametrize("factor", [1e300, 1e-300])
def test_scale_does_not_change_the_shape(rng, factor):
    x = rng.standard_normal((4, 50)) ** 3
    plain, scaled = summary_statistics(x), summary_statistics(x * factor)
    np.testing.assert_allclose(scaled[:, :5] / factor, plain[:, :5], rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(scaled[:, 5:], plain[:, 5:], rtol=EXACT)


def test_constant_rows_have_no_spread():
    x = np.full((3, 1001), 0.1)
    found = summary_statistics(x)
    np.testing.assert_array_equal(found, [[0.1, 0, 0.1, 0.1, 0.1, 0, 0]] * 3)


def test_slices_and_memory_maps_give_the_same(rng, tmp_path):
    x = rng.standard_normal((70, 2000), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for part in (slice(300, 620), slice(3, None, 7)):
        expected = summary_statistics(np.ascontiguousarray(x[:, part]))
        np.testing.assert_array_equal(summary_statistics(mapped[:, part]), expected)
    assert type(summary_statistics(mapped)) is np.ndarray


def test_input_is_left_alone(rng):
    x = rng.standard_normal((5, 100))
    before = x.copy()
    summary_statistics(x)
    np.testing.assert_array_equal(x, before)


def test_any_choice_and_order_of_statistics(rng):
    x = rng.standard_normal((6, 90), dtype=np.float32)
    everything = summary_statistics(x)
    for i, first in enumerate(STATISTICS):
        for j, second in enumerate(STATISTICS):
            found = summary_statistics(x, (first, second))
            np.testing.assert_array_equal(found, everything[:, [i, j]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 2, 256, 257, 5000])
def test_in_place_finds_the_same_and_keeps_every_row_s_values(rng, width: int, dtype: type):
    x = rng.standard_normal((7, width)).astype(dtype) + np.arange(7, dtype=dtype)[:, None]
    kept = x.copy()
    expected = summary_statistics(x)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(summary_statistics(x, overwrite_input=True), expected)
    np.testing.assert_array_equal(np.sort(x), np.sort(kept))


def test_no_rows_and_no_statistics():
    assert summary_statistics(np.zeros((0, 4))).shape == (0, 7)
    assert summary_statistics(np.ones((3, 4)), ()).shape == (3, 0)


@pytest.mark.parametrize(
    "x", [np.ones(3), np.ones((2, 0)), np.ones((2, 3), np.int64), np.ones((2, 3), np.float16)]
)
def test_refuses_what_it_cannot_read(x):
    with pytest.raises(ValueError, match="expected a float32 or float64 matrix"):
        summary_statistics(x)


@pytest.mark.parametrize("statistics", [("mean", "mode"), "mean"])
def test_refuses_unknown_statistics(statistics):
    with pytest.raises(ValueError, match="expected a sequence of names"):
        summary_statistics(np.ones((2, 3)), statistics)


def test_product_moments_agree_with_the_products(rng):
    a, b = rng.standard_normal((5, 30)) + 2, rng.standard_normal((5, 17)) ** 3
    expected = reference((a[:, :, None] * b[:, None, :]).reshape(5, -1))
    for higher, names in ((True, {"mean", "std", "kurtosis", "skew"}), (False, {"mean", "std"})):
        found = product_moments(np.sort(a), np.sort(b), higher)
        assert set(found) == names
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[:, STATISTICS.index(name)], rtol=EXACT)
