"""Streamed principal components against scikit-learn's full decomposition in float64."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from tolerances import EXACT, rounding

from lora_ws.functional import gram_pca, pca, project
from lora_ws.functional.rows import Rows


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def low_rank(rng, n, d, decay=0.8, rank=40, noise=0.02):
    """Rows with falling variances in shared directions, unequal column scales, one constant."""
    weights = rng.standard_normal((n, rank)) * decay ** np.arange(rank)
    x = weights @ rng.standard_normal((rank, d)) + noise * rng.standard_normal((n, d))
    x = x * np.logspace(-2, 2, d) + 3
    x[:, d // 2] = 0.1
    return x


def reference(x, k, scaled):
    """scikit-learn's decomposition of independently standardised data, and that data."""
    x = x.astype(np.float64)
    std = x.std(axis=0, ddof=1) if scaled else np.ones(x.shape[1])
    centred = x - x.mean(axis=0)
    centred[:, np.ptp(x, axis=0) == 0] = 0
    data = centred / np.where(np.ptp(x, axis=0) == 0, 1, std)
    return PCA(k, svd_solver="full").fit(data), data


def bound_of(x):
    """Of what is summed over rows or columns, relative to the largest."""
    return EXACT if x.dtype == np.float64 else rounding(max(x.shape))


def assert_matches(fit, x, k, scaled):
    expected, data = reference(x, k, scaled)
    bound, largest = bound_of(x), expected.singular_values_[0]
    # Rounding moves every singular value by at most a share of the largest (Weyl).
    np.testing.assert_allclose(
        fit.singular_values, expected.singular_values_, rtol=0, atol=bound * largest
    )
    np.testing.assert_allclose(
        fit.explained_variance_ratio, expected.explained_variance_ratio_, rtol=0, atol=2 * bound
    )
    # A cosine is off by the square of the angle.
    cosines = np.abs((fit.components * expected.components_).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, rtol=0, atol=bound)
    # The krylov solver stops at residuals of 1e-6 of the largest eigenvalue.
    residual = bound + 1e-6 * (fit.solver == "krylov")
    atol = residual * largest**2 / expected.singular_values_[-1]
    np.testing.assert_allclose(fit.scores, data @ fit.components.T, rtol=0, atol=atol)
    assert fit.components.dtype == fit.scores.dtype == x.dtype
    assert fit.singular_values.dtype == np.float64


@pytest.mark.parametrize("solver", ["gram", "krylov"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(60, 5000), (400, 90)])
def test_agrees_with_full_decomposition(rng, solver, scaled, dtype, shape):
    x = low_rank(rng, *shape).astype(dtype)
    fit = pca(x, 8, standardize=scaled, solver=solver, passes=100)
    assert fit.solver == solver
    assert_matches(fit, x, 8, scaled)


@pytest.mark.parametrize("shape", [(300, 1200), (1200, 300)])
def test_krylov_on_a_flat_spectrum(rng, shape):
    x = rng.standard_normal(shape)
    fit = pca(x, 12, solver="krylov", passes=100)
    expected, _ = reference(x, 13, True)
    # Of residuals of 1e-6 of the largest eigenvalue: the angle to the wanted space is that over the
    # gap to the next eigenvalue, and eigenvalues and cosines are off by its square.
    values = expected.singular_values_**2
    angle = 1e-6 * values[0] / (values[11] - values[12])
    np.testing.assert_allclose(fit.singular_values, values[:12] ** 0.5, rtol=angle**2 + EXACT)
    captured = np.linalg.svd(fit.components @ expected.components_[:12].T, compute_uv=False)
    np.testing.assert_allclose(captured, 1, rtol=0, atol=angle**2 + EXACT)


@pytest.mark.parametrize("solver", ["gram", "krylov"])
def test_all_components(rng, solver):
    x = rng.standard_normal((12, 30))
    fit = pca(x, 11, solver=solver)
    assert_matches(fit, x, 11, True)
    np.testing.assert_allclose(fit.explained_variance_ratio.sum(), 1, rtol=EXACT)


@pytest.mark.parametrize("solver", ["gram", "krylov"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 900), (900, 40)])
def test_components_beyond_the_rank_are_zero(rng, solver, dtype, shape):
    x = (rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))).astype(dtype)
    fit = pca(x, 7, solver=solver)
    assert (fit.singular_values[:3] > 1).all()
    for part in (fit.singular_values[3:], fit.components[3:], fit.scores[:, 3:]):
        np.testing.assert_array_equal(part, 0)
    np.testing.assert_allclose(fit.explained_variance_ratio.sum(), 1, rtol=bound_of(x))


@pytest.mark.parametrize("solver", ["gram", "krylov"])
def test_repeated_eigenvalues_are_all_found(solver):
    x = np.concatenate([np.diag([2.0] * 9 + [1.0] * 30), -np.diag([2.0] * 9 + [1.0] * 30)])
    fit = pca(x, 12, standardize=False, solver=solver)
    np.testing.assert_allclose(fit.singular_values**2, [8] * 9 + [2] * 3, rtol=EXACT)


@pytest.mark.parametrize("solver", ["gram", "krylov"])
def test_constant_data_has_no_components(solver):
    fit = pca(np.full((5, 6), 0.1), 2, solver=solver)
    for part in (fit.singular_values, fit.components, fit.scores, fit.explained_variance_ratio):
        np.testing.assert_array_equal(part, 0)
    np.testing.assert_array_equal(fit.scale, 1)


@pytest.mark.parametrize("shape", [(50, 400), (400, 50)])
def test_result_does_not_depend_on_blocks_or_row_strips(rng, monkeypatch, shape):
    x = low_rank(rng, *shape)
    whole = pca(x, 5)
    monkeypatch.setattr(gram_pca, "_BLOCK_COLUMNS", 17)
    monkeypatch.setattr(gram_pca, "_STRIP_ROWS", 13)
    parts = pca(x, 5)
    np.testing.assert_allclose(parts.singular_values, whole.singular_values, rtol=EXACT)
    np.testing.assert_allclose(parts.components, whole.components, atol=EXACT)


@pytest.mark.parametrize("solver", ["gram", "krylov"])
def test_signs_and_repetition(rng, solver):
    x = low_rank(rng, 30, 200)
    fit, again, flipped = (pca(y, 6, solver=solver) for y in (x, x, -x))
    np.testing.assert_array_equal(fit.components, again.components)
    picked = np.abs(fit.components).argmax(axis=1)
    assert (fit.components[np.arange(6), picked] > 0).all()
    largest = fit.singular_values[0]
    np.testing.assert_allclose(flipped.components, fit.components, atol=EXACT)
    np.testing.assert_allclose(flipped.scores, -fit.scores, atol=EXACT * largest)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_project(rng, tmp_path, dtype):
    x = low_rank(rng, 40, 700).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    fit = pca(mapped, 6)
    arguments = (fit.mean, fit.scale, fit.components)
    scores = project(mapped, *arguments)
    assert scores.dtype == dtype
    atol = bound_of(x) * fit.singular_values[0]
    np.testing.assert_allclose(scores, fit.scores, rtol=0, atol=atol)
    new = x[:3] + dtype(1)
    scaled = (new.astype(np.float64) - fit.mean) / fit.scale
    size = (np.abs(scaled) @ np.abs(fit.components.T)).max()
    expected = scaled @ fit.components.T
    np.testing.assert_allclose(project(new, *arguments), expected, rtol=0, atol=bound_of(x) * size)
    small = project(x, *arguments, max_memory_mb=0)
    np.testing.assert_allclose(small, scores, rtol=0, atol=atol)


def test_memory_decides_the_solver(rng):
    x = low_rank(rng, 400, 500).astype(np.float32)
    assert pca(x, 3, max_memory_mb=64).solver == "gram"
    tight = pca(x, 3, max_memory_mb=4)
    assert tight.solver == "krylov"
    whole = pca(x, 3)
    np.testing.assert_allclose(tight.singular_values, whole.singular_values, rtol=bound_of(x))
    with pytest.raises(ValueError, match=r"needs \d+ MiB.*krylov"):
        pca(x, 3, solver="gram", max_memory_mb=4)


def test_little_memory_restarts_krylov_and_too_little_is_said(rng):
    x = low_rank(rng, 300, 1600).astype(np.float32)
    roomy = pca(x, 10, solver="krylov", passes=40)
    tight = pca(x, 10, solver="krylov", passes=40, max_memory_mb=1)
    np.testing.assert_allclose(tight.singular_values, roomy.singular_values, rtol=bound_of(x))
    with pytest.raises(ValueError, match=r"memory for two blocks of 108 vectors.* take 5 MiB"):
        pca(x, 100, solver="krylov", max_memory_mb=2)


def spectrum(name, n):
    """Standard deviations of n shared directions; flat is noise alone."""
    places = np.arange(1, n + 1)
    return {
        "flat": np.ones(n),
        "power": places**-0.5,
        "exponential": np.maximum(0.97**places, 1e-3),
        "steps": np.where(places <= 30, 10.0, 1.0),
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "power", "exponential", "steps"])
def test_six_passes_over_3000_rows_are_within_two_percent(name):
    rng = np.random.default_rng(1)
    n, d, k = 3000, 9000, 200
    x = (rng.standard_normal((n, n)) * spectrum(name, n)) @ rng.standard_normal((n, d))
    fit = pca(x.astype(np.float32), k, standardize=False, solver="krylov")
    x -= x.mean(axis=0)
    exact = np.sqrt(np.linalg.eigvalsh(x @ x.T)[::-1][:k])
    error = 1 - fit.singular_values / exact
    assert -rounding(d) < error.min()
    assert error.max() < 0.02
    assert (fit.singular_values**2).sum() > 0.98 * (exact**2).sum()


@pytest.mark.parametrize("k", [290, 299])
def test_krylov_near_as_many_components_as_rows(rng, k):
    x = low_rank(rng, 300, 1000, rank=290, decay=0.98)
    fit = pca(x, k, solver="krylov", passes=12)
    expected, _ = reference(x, k, True)
    # An eigenvalue is off by the residual at most, which is 1e-6 of the largest.
    found, values = fit.singular_values**2, expected.singular_values_**2
    np.testing.assert_allclose(found, values, rtol=0, atol=1.01e-6 * values[0])


@pytest.mark.parametrize("shape", [(90, 400), (400, 90)])
@pytest.mark.parametrize("solver", ["gram", "krylov"])
def test_rows_of_a_file_give_the_same_as_a_copy_of_them(rng, tmp_path, monkeypatch, solver, shape):
    """By several panels, of which each meets those before it."""
    whole = low_rank(rng, *shape)
    np.save(tmp_path / "x.npy", whole)
    mapped, index = np.load(tmp_path / "x.npy", mmap_mode="r"), rng.permutation(shape[0])[:80]
    chosen = np.r_[0:30, 50 : shape[1]]
    copy = pca(whole[index][:, chosen], 6, solver=solver, passes=20)
    monkeypatch.setattr(gram_pca, "_BLOCK_COLUMNS", 27)
    fit = pca(Rows(mapped, index, chosen), 6, solver=solver, passes=20)
    np.testing.assert_allclose(fit.singular_values, copy.singular_values, rtol=1e-9)
    np.testing.assert_allclose(fit.scores, copy.scores, atol=1e-6 * copy.singular_values[0])
    arguments = (fit.mean, fit.scale, fit.components)
    np.testing.assert_allclose(
        project(Rows(mapped, index, chosen), *arguments), fit.scores, atol=EXACT * 1e3
    )


@pytest.mark.parametrize(("shape", "k"), [((5, 9), 5), ((9, 4), 5), ((5, 9), 0), ((1, 9), 1)])
def test_refuses_impossible_numbers_of_components(shape, k):
    with pytest.raises(ValueError, match=f"expected n_components from 1 to .* got {k}"):
        pca(np.ones(shape), k)


@pytest.mark.parametrize("x", [np.ones(4), np.ones((4, 4), np.int32)])
def test_refuses_other_arrays(x):
    with pytest.raises(ValueError, match="expected a float32 or float64 matrix"):
        pca(x, 1)


def test_refuses_unknown_solvers(rng):
    with pytest.raises(ValueError, match="got 'svd'"):
        pca(rng.standard_normal((4, 5)), 1, solver="svd")


def test_project_refuses_other_widths():
    with pytest.raises(ValueError, match="expected rows as wide as the components"):
        project(np.ones((2, 3)), np.ones(4), np.ones(4), np.ones((1, 4)))
