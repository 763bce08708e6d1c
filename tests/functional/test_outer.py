"""Statistics of updates against the products themselves."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, rounding

from lora_ws.functional import STATISTICS, outer, outer_statistics, summary_statistics

MOMENTS = ("mean", "std", "kurtosis", "skew")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def products(down, up, dtype=np.float64):
    """All entries of every update, formed by torch."""
    factors = (torch.from_numpy(np.ascontiguousarray(f).astype(dtype)) for f in (down, up))
    return torch.einsum("brk,bfr->bfk", *factors).flatten(1).numpy()


def lower_median(values):
    return torch.from_numpy(values).median(dim=1).values.numpy()


def assert_exact_order(found, down, up):
    """Median, min and max equal those of the products, in float64 and in float32."""
    for dtype in (np.float64, np.float32):
        values = products(down, up, dtype)
        expected = np.stack([lower_median(values), values.min(1), values.max(1)], axis=1)
        np.testing.assert_array_equal(found[:, 2:5].astype(dtype), expected)


def assert_moments(found, down, up, tolerance=EXACT):
    expected = summary_statistics(products(down, up))
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=tolerance)
    assert (np.abs(found[:, 0] - expected[:, 0]) <= tolerance * expected[:, 1] + 1e-300).all()
    np.testing.assert_allclose(found[:, 5:], expected[:, 5:], rtol=tolerance, atol=tolerance)


def as_factors(a, b):
    return a[:, None, :].astype(np.float32), b[:, :, None].astype(np.float32)


def vectors(kind, rng, rows, n, m):
    """Pairs of vectors of every kind that decides how the median is found."""
    a, b = rng.standard_normal((rows, n)), 1e-3 * rng.standard_normal((rows, m))
    if kind == "shifted":
        a, b = a + 1, b + 2e-3
    elif kind == "one sign":
        a, b = np.abs(a) + 0.1, np.abs(b)
    elif kind == "one side":
        a = -np.abs(a)
    elif kind == "ties":
        a, b = np.round(2 * a), np.round(2000 * b)
    elif kind == "zeros":
        b[:, ::2] = 0
    elif kind == "heavy tails":
        a, b = a**5, b * np.exp(6 * rng.standard_normal(b.shape))
    elif kind == "narrow":
        a, b = 5 + 1e-3 * a, 1 + b
    elif kind == "constant":
        a, b = np.full_like(a, -0.3), np.full_like(b, 1.7)
    return a, b


KINDS = [
    *("gaussian", "shifted", "one sign", "one side", "ties"),
    *("zeros", "heavy tails", "narrow", "constant"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(320, 320), (768, 320), (7, 5), (1, 9), (1, 1), (2, 2), (33, 64)]
)
def test_rank_one(rng, kind, shape):
    down, up = as_factors(*vectors(kind, rng, 4, *shape))
    found = outer_statistics(down, up)
    assert_exact_order(found, down, up)
    # Where the spread is tiny the float64 products themselves carry the error.
    assert_moments(found, down, up, 1e-7 if kind == "narrow" else 1e-9)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    hyperbola_up_to=st.sampled_from([0, 4, 4096]),
    bracket_leaves=st.sampled_from([0, 8, 1 << 15]),
)
@settings(max_examples=400, deadline=None)
def test_median_is_exact_on_every_path(seed, kind, n, m, hyperbola_up_to, bracket_leaves):
    down, up = as_factors(*vectors(kind, np.random.default_rng(seed), 3, n, m))
    a, b = (np.sort(v.astype(np.float64), axis=1) for v in (down[:, 0, :], up[:, :, 0]))
    found = outer._medians(a, b, hyperbola_up_to, bracket_leaves)
    np.testing.assert_array_equal(found, lower_median(products(down, up)))


def recording(name, function, calls):
    def call(*args):
        calls.append(name)
        return function(*args)

    return call


def test_every_path_of_the_median_is_taken(rng, monkeypatch):
    taken = []
    for name in ("_hyperbola", "_bracketed"):
        monkeypatch.setattr(outer, name, recording(name, getattr(outer, name), taken))
    for kind in ("gaussian", "one sign"):
        outer_statistics(*as_factors(*vectors(kind, rng, 2, 300, 200)))
    assert set(taken) == {"_hyperbola", "_bracketed"}


def test_uncertain_bracket_falls_back_to_all_products(rng, monkeypatch):
    short, long = np.sort(rng.random(20)) + 0.1, np.sort(rng.random(30)) + 0.1
    expected = np.sort(np.outer(short, long).ravel())
    everything = [np.array([0] * 20)], [np.array([30] * 20)]
    # A bracket that ends exactly at the value sought cannot be certified.
    monkeypatch.setattr(outer, "_bracket", lambda *_: (0.0, float(expected[77]), *everything))
    assert outer._bracketed([[short, long]], 77, 8) == expected[77]


def test_deep_medians_of_quantised_vectors(rng):
    down, up = as_factors(rng.integers(1, 16, (2, 640)), rng.integers(1, 16, (2, 640)))
    assert_exact_order(outer_statistics(down, up), down, up)


@pytest.mark.slow
def test_more_rows_than_one_block(rng):
    down, up = as_factors(rng.standard_normal((450, 300)), rng.standard_normal((450, 200)))
    found = outer_statistics(down, up)
    assert_exact_order(found, down, up)
    np.testing.assert_array_equal(outer_statistics(down[::-1], up[::-1]), found[::-1])


@pytest.mark.parametrize("rank", [1, 2, 17])
def test_float64_uses_the_rounded_products(rng, rank):
    down, up = rng.standard_normal((3, rank, 40)), rng.standard_normal((3, 30, rank))
    values = np.stack([(u @ d).ravel() for d, u in zip(down, up, strict=True)])
    found = outer_statistics(down, up)
    np.testing.assert_array_equal(found[:, 2], lower_median(values))
    assert_moments(found, down, up)


@pytest.mark.parametrize("rank", [2, 4, 15, 16, 17])
def test_higher_ranks(rng, rank):
    down = (rng.standard_normal((3, rank, 70)) + 0.1).astype(np.float32)
    up = (1e-3 * rng.standard_normal((3, 50, rank)) + 2e-4).astype(np.float32)
    found = outer_statistics(down, up)
    values = products(down, up)
    expected = np.stack([lower_median(values), values.min(1), values.max(1)], axis=1)
    atol = rounding(rank, size=(np.abs(up) @ np.abs(down)).max())
    np.testing.assert_allclose(found[:, 2:5], expected, rtol=0, atol=atol)
    # At rank 16 and more the moments are those of the float32 product, up to its fourth power.
    assert_moments(found, down, up, EXACT if rank < 16 else 4 * rounding(rank))


def test_order_statistics_are_those_of_the_float32_product(rng):
    down = rng.standard_normal((2, 3, 70), dtype=np.float32)
    up = rng.standard_normal((2, 50, 3), dtype=np.float32)
    values = np.stack([(u @ d).ravel() for d, u in zip(down, up, strict=True)])
    found = outer_statistics(down, up, ("median", "min", "max"))
    np.testing.assert_array_equal(
        found, np.stack([lower_median(values), values.min(1), values.max(1)], axis=1)
    )


def test_moments_of_small_ranks_need_no_product(rng):
    down = rng.standard_normal((1, 2, 2000), dtype=np.float32)
    up = rng.standard_normal((1, 2000, 2), dtype=np.float32)
    peaks = []
    for statistics in (MOMENTS, STATISTICS):
        tracemalloc.start()
        outer_statistics(down, up, statistics)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 4e6 < 16e6 <= peaks[1] < 3 * 16e6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("statistics", [MOMENTS, STATISTICS])
def test_cancelling_factors_leave_no_spread(rng, dtype, statistics):
    row = rng.standard_normal((2, 1, 30)).astype(dtype)
    down, up = np.concatenate([row, row], axis=1), np.ones((2, 20, 2), dtype)
    up[:, :, 1] = -1
    found = outer_statistics(down, up, statistics)
    np.testing.assert_array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 2, 5, 17])
def test_constant_products(dtype, rank):
    # Above rank 1 the entries are sums, constant only if nothing is rounded.
    a, b = (0.1, 0.7) if rank == 1 else (0.125, 0.75)
    down, up = np.full((2, rank, 9), a, dtype), np.full((2, 11, rank), b, dtype)
    found = outer_statistics(down, up)
    np.testing.assert_array_equal(found[:, [1, 5, 6]], 0)
    np.testing.assert_allclose(found[:, [0, 2, 3, 4]], rank * a * b, rtol=rounding(3))


def test_nearly_cancelling_factors_match_the_product(rng):
    row = rng.standard_normal((2, 1, 30))
    down = np.concatenate([row, row + 1e-5 * rng.standard_normal((2, 1, 30))], axis=1)
    up = np.repeat(rng.standard_normal((2, 20, 1)), 2, axis=2) * [1, -1]
    assert_moments(outer_statistics(down, up), down, up)


@given(
    seed=st.integers(0, 2**32 - 1),
    rank=st.sampled_from([1, 2, 3, 17]),
    dtype=st.sampled_from([np.float32, np.float64]),
    share=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
@settings(max_examples=200, deadline=None)
def test_no_finite_input_makes_nan(seed, rank, dtype, share):
    rng, most = np.random.default_rng(seed), np.log10(float(np.finfo(dtype).max)) - 1
    down, up = rng.standard_normal((2, rank, 5)), rng.standard_normal((2, 4, rank))
    down, up = down * 10 ** (share[0] * most), up * 10 ** (share[1] * most)
    found = outer_statistics(down.astype(dtype), up.astype(dtype))
    assert np.isfinite(found).all()
    assert (found[:, 3] <= found[:, 2]).all()
    assert (found[:, 2] <= found[:, 4]).all()
    np.testing.assert_array_equal(found[:, 1][found[:, 3] == found[:, 4]], 0)


@pytest.mark.parametrize("rank", [1, 3, 17])
@pytest.mark.parametrize("powers", [(400, -390), (400, 500), (-400, -500)])
def test_float64_extremes_keep_their_shape(rng, rank, powers):
    down, up = rng.standard_normal((2, rank, 20)), rng.standard_normal((2, 30, rank))
    plain = outer_statistics(down, up)
    scaled = outer_statistics(np.ldexp(down, powers[0]), np.ldexp(up, powers[1]))
    np.testing.assert_allclose(scaled[:, 5:], plain[:, 5:], rtol=EXACT)
    np.testing.assert_allclose(np.ldexp(scaled, -sum(powers))[:, :5], plain[:, :5], rtol=EXACT)


@pytest.mark.parametrize("rank", [1, 4])
def test_any_choice_of_statistics(rng, rank):
    down = rng.standard_normal((3, rank, 40), dtype=np.float32)
    up = rng.standard_normal((3, 20, rank), dtype=np.float32)
    everything = outer_statistics(down, up)
    for i, first in enumerate(STATISTICS):
        for j, second in enumerate(STATISTICS):
            found = outer_statistics(down, up, (first, second))
            np.testing.assert_array_equal(found, everything[:, [i, j]])


@pytest.mark.parametrize("rank", [1, 2])
def test_no_rows(rank):
    assert outer_statistics(np.zeros((0, rank, 4)), np.zeros((0, 3, rank))).shape == (0, 7)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((2, 1, 4), (3, 5, 1)),
        ((2, 1, 4), (2, 5, 2)),
        ((2, 4), (2, 5)),
        ((2, 0, 4), (2, 5, 0)),
        ((2, 1, 0), (2, 5, 1)),
    ],
)
def test_refuses_shapes_that_do_not_fit(down, up):
    with pytest.raises(ValueError, match=r"expected down \[rows, rank, in_features\]"):
        outer_statistics(np.ones(down), np.ones(up))


def test_refuses_mixed_dtypes():
    with pytest.raises(ValueError, match="both float32 or both float64"):
        outer_statistics(np.ones((1, 1, 2)), np.ones((1, 2, 1), np.float32))
