"""Kernels of updates against updates that are formed, and kernel PCA against scikit-learn."""

import numpy as np
import pytest
from sklearn.decomposition import PCA, KernelPCA
from tolerances import EXACT

from lora_ws.errors import ConfigError
from lora_ws.functional import delta_gram, kernel_pca
from lora_ws.functional.delta_gram import (
    KERNELS,
    directions_gram,
    negligible_layers,
    update_directions,
    update_norms,
)

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
SHAPES = [(1, 7, 5), (3, 7, 5), (4, 3, 6), (6, 4, 5)]  # rank, in, out; the last two exceed a side
every_shape = pytest.mark.parametrize(("rank", "width", "height"), SHAPES)


def factors(n=9, rank=3, width=7, height=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, rank, width)), rng.standard_normal((n, height, rank))


def side(update, kernel):
    """What a kernel takes the inner product of, from an update that is formed."""
    transposed = update.transpose(0, 2, 1)
    products = {"left": update @ transposed, "right": transposed @ update, "delta": update}
    return products[kernel].reshape(len(update), -1)


def explicit_gram(update, kernel, normalize=False):
    values = side(update, kernel)
    gram = values @ values.T
    own = np.sqrt(np.diag(gram))
    return gram / np.outer(own, own) if normalize else gram


def explicit_whitening(update, shrinkage):
    """Updates of unit norm, what they write whitened by the second moment."""
    update = update / np.sqrt((update**2).sum(axis=(1, 2), keepdims=True))
    moment = np.mean([one @ one.T for one in update], axis=0)
    width = len(moment)
    shrunk = (1 - shrinkage) * moment + shrinkage * np.trace(moment) / width * np.eye(width)
    values, vectors = np.linalg.eigh(shrunk)
    matrix = vectors @ np.diag(values**-0.5) @ vectors.T
    return matrix @ update


@every_kernel
@every_shape
@pytest.mark.parametrize("normalize", [True, False])
def test_gram_is_that_of_formed_updates(kernel, rank, width, height, normalize):
    down, up = factors(9, rank, width, height)
    expected = explicit_gram(up @ down, kernel, normalize)
    got = delta_gram(down, up, kernel, normalize=normalize)
    np.testing.assert_allclose(got, expected, rtol=EXACT, atol=EXACT * expected.max())


@every_kernel
@every_shape
@pytest.mark.parametrize("normalize", [True, False])
def test_whitening_is_that_of_formed_updates(kernel, rank, width, height, normalize):
    down, up = factors(9, rank, width, height)
    update = up @ down
    flipped = update.transpose(0, 2, 1) if kernel == "right" else update
    # A moment of unit mean diagonal is the same up to a factor, which normalising removes.
    one_side = explicit_whitening(flipped, 0.3)
    expected = explicit_gram(one_side, "left" if kernel == "right" else kernel, normalize)
    got = delta_gram(down, up, kernel, normalize=normalize, whiten=0.3)
    ratio = got[0, 0] / expected[0, 0]
    if normalize:
        assert ratio == pytest.approx(1)
    np.testing.assert_allclose(got, ratio * expected, rtol=EXACT, atol=EXACT * got.max())


def test_rank_one_left_is_the_squared_cosine_of_b():
    down, up = factors(rank=1)
    b = up[:, :, 0] / np.linalg.norm(up[:, :, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(delta_gram(down, up, "left"), (b @ b.T) ** 2, atol=EXACT)


@every_kernel
@pytest.mark.parametrize("whiten", [None, 0.2])
def test_another_split_of_the_same_updates_changes_nothing(kernel, whiten):
    down, up = factors()
    expected = delta_gram(down, up, kernel, whiten=whiten)
    mixing = np.random.default_rng(5).standard_normal((len(up), 3, 3))
    other = delta_gram(np.linalg.inv(mixing) @ down, up @ mixing, kernel, whiten=whiten)
    np.testing.assert_allclose(other, expected, atol=EXACT)
    np.testing.assert_allclose(delta_gram(-down, -up, kernel, whiten=whiten), expected, atol=EXACT)
    size = np.exp(np.random.default_rng(6).standard_normal((len(up), 1, 1)))
    np.testing.assert_allclose(
        delta_gram(down, size * up, kernel, whiten=whiten), expected, atol=EXACT
    )


@every_kernel
@pytest.mark.parametrize("whiten", [None, 0.2])
@pytest.mark.parametrize("zeros", ["both", "up only"])
def test_padded_rank_changes_nothing(kernel, whiten, zeros):
    down, up = factors(rank=2)
    rows = np.zeros((9, 2, 7)) if zeros == "both" else factors(rank=2, seed=3)[0]
    padded = delta_gram(
        np.concatenate([down, rows], axis=1),
        np.concatenate([up, np.zeros((9, 5, 2))], axis=2),
        kernel,
        whiten=whiten,
    )
    np.testing.assert_allclose(padded, delta_gram(down, up, kernel, whiten=whiten), atol=EXACT)


@pytest.mark.parametrize("kernel", ["left", "right"])
def test_one_side_is_blind_to_the_sign_and_the_whole_is_not(kernel):
    down, up = factors()
    signs = np.where(np.arange(9) % 2, -1.0, 1.0)
    flipped = signs[:, None, None] * up
    np.testing.assert_allclose(
        delta_gram(down, flipped, kernel), delta_gram(down, up, kernel), atol=EXACT
    )
    expected = delta_gram(down, up, "delta") * np.outer(signs, signs)
    np.testing.assert_allclose(delta_gram(down, flipped, "delta"), expected, atol=EXACT)


@every_kernel
@pytest.mark.parametrize("whiten", [None, 0.2])
@pytest.mark.parametrize("normalize", [True, False])
def test_updates_of_zero_give_zeros(kernel, whiten, normalize):
    down, up = factors()
    up[4] = 0
    down[7] = 0
    gram = delta_gram(down, up, kernel, whiten=whiten, normalize=normalize)
    assert np.isfinite(gram).all()
    assert not gram[[4, 7]].any()
    assert not gram[:, [4, 7]].any()
    nothing = delta_gram(0 * down, 0 * up, kernel, whiten=whiten, normalize=normalize)
    assert not nothing.any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_sizes_do_not_matter(scale):
    down, up = factors()
    expected = delta_gram(down, up, "left")
    np.testing.assert_allclose(
        delta_gram(scale * down, scale * up, "left"), expected, rtol=EXACT, atol=EXACT
    )


@every_kernel
def test_adapters_of_other_ranks_can_be_compared(kernel):
    down, up = factors(6, rank=1)
    more_down, more_up = factors(4, rank=3, seed=1)
    got = directions_gram(
        update_directions(down, up, kernel), update_directions(more_down, more_up, kernel)
    )
    expected = side(up @ down, kernel) @ side(more_up @ more_down, kernel).T
    np.testing.assert_allclose(got, expected, rtol=EXACT, atol=EXACT)


@every_shape
def test_norms_are_those_of_formed_updates(rank, width, height):
    down, up = factors(9, rank, width, height)
    expected = np.linalg.norm(up @ down, axis=(1, 2))
    np.testing.assert_allclose(update_norms(down, up), expected, rtol=EXACT)


def test_negligible_is_relative_to_the_adapter_itself():
    norms = np.array([[1.0, 1e-3, 1e-6], [1e-6, 1e-9, 1e-12]])
    np.testing.assert_array_equal(negligible_layers(norms), [[False, False, True]] * 2)


def test_wrong_factors_and_kernels_are_refused():
    down, up = factors()
    with pytest.raises(ConfigError, match="got 'both'"):
        delta_gram(down, up, "both")
    with pytest.raises(ConfigError, match="same adapters"):
        delta_gram(down[:-1], up, "left")
    with pytest.raises(ConfigError, match="same adapters"):
        delta_gram(down[:, :2], up, "left")


def positive_gram(n=30, d=12):
    x = np.random.default_rng(2).standard_normal((n, d))
    return (x @ x.T + 1) ** 2, x


def test_kernel_pca_matches_scikit_learn():
    gram, _ = positive_gram()
    reference = KernelPCA(5, kernel="precomputed", eigen_solver="dense").fit(gram[:20, :20])
    fit = kernel_pca(gram[:20, :20], 5)
    new = gram[20:, :20] @ fit.dual - fit.offset
    for scores, rows in ((fit.scores, gram[:20, :20]), (new, gram[20:, :20])):
        expected = np.abs(reference.transform(rows))
        atol = EXACT * expected.max()
        np.testing.assert_allclose(np.abs(scores), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(fit.eigenvalues, reference.eigenvalues_, rtol=EXACT)


def test_linear_kernel_gives_plain_principal_components():
    _, x = positive_gram()
    gram = x @ x.T
    expected = PCA(4, svd_solver="full").fit_transform(x)
    np.testing.assert_allclose(np.abs(kernel_pca(gram, 4).scores), np.abs(expected), atol=EXACT)


def test_landmarks_that_span_the_space_are_exact():
    _, x = positive_gram(30, 6)
    kept = np.arange(0, 30, 3)
    fit = kernel_pca(x @ x[kept].T, 6, landmarks=kept, noise=1e-12)
    exact = kernel_pca(x @ x.T, 6)
    expected = np.abs(exact.scores)
    np.testing.assert_allclose(np.abs(fit.scores), expected, rtol=0, atol=EXACT * expected.max())
    np.testing.assert_allclose(fit.eigenvalues, exact.eigenvalues, rtol=EXACT)


@pytest.mark.parametrize("kept", [None, np.arange(10)])
def test_components_beyond_the_rank_are_zero(kept):
    _, x = positive_gram(20, 3)
    gram = x @ x.T if kept is None else x @ x[kept].T
    fit = kernel_pca(gram, 8, landmarks=kept, noise=1e-10)
    assert not fit.scores[:, 3:].any()
    assert not fit.dual[:, 3:].any()
    assert np.abs(fit.scores[:, :3]).max(axis=0).min() > 0.1
    empty = kernel_pca(0 * gram, 8, landmarks=kept)
    assert not empty.scores.any()


def test_signs_do_not_depend_on_the_solver():
    gram, _ = positive_gram()
    dual = kernel_pca(gram, 5).dual
    assert (dual[np.abs(dual).argmax(axis=0), np.arange(5)] > 0).all()


def test_wrong_kernels_of_kernel_pca_are_refused():
    gram, _ = positive_gram()
    with pytest.raises(ConfigError, match="a column for each landmark"):
        kernel_pca(gram[:, :8], 3)
    with pytest.raises(ConfigError, match="a column for each landmark"):
        kernel_pca(gram[:, :8], 3, landmarks=np.arange(7))
    for k in (0, 30):
        with pytest.raises(ConfigError, match="from 1 to min"):
            kernel_pca(gram, k)


def test_inputs_are_left_alone():
    down, up = factors()
    delta_gram(down, up, "delta", whiten=0.5)
    np.testing.assert_array_equal(down, factors()[0])
    gram, _ = positive_gram()
    kernel_pca(gram, 3)
    np.testing.assert_array_equal(gram, positive_gram()[0])
