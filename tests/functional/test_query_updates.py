"""Second moments against Jacobians of attention, likelihoods against scipy and dense updates."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from tolerances import EXACT

from lora_ws.errors import ConfigError
from lora_ws.functional.delta_gram import update_directions
from lora_ws.functional.query_updates import (
    log_likelihood_ratio,
    noisy_correlation,
    update_covariance,
)


def correlation(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Positive definite with a unit diagonal, ``[*batch, d, d]``."""
    factors = rng.standard_normal((*shape, shape[-1] + 1))
    return noisy_correlation(factors @ factors.swapaxes(-1, -2), 0.1)


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_covariance_is_that_of_the_jacobian_of_attention(tokens: int) -> None:
    heads, n, width, out = 2, 4, 3, 5
    torch.manual_seed(tokens)
    queries, keys, values = (
        torch.randn(heads, rows, size, dtype=torch.float64)
        for rows, size in ((n, width), (tokens, width), (tokens, out))
    )
    weights = torch.rand(n, dtype=torch.float64)
    expected = np.zeros((heads, width, width))
    for head in range(heads):
        for query, weight in zip(queries[head], weights, strict=True):
            jacobian = torch.autograd.functional.jacobian(
                lambda q, h=head: (keys[h] @ q).softmax(0) @ values[h], query
            )
            expected[head] += float(weight) * np.asarray(jacobian.T @ jacobian)
    attention = (queries @ keys.mT).softmax(-1)
    found = update_covariance(*(x.numpy() for x in (attention, weights, keys, values)))
    np.testing.assert_allclose(found, expected, atol=EXACT)


def test_correlation_has_a_unit_diagonal_and_no_direction_below_its_noise() -> None:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((3, 6, 2)) * np.array([1e-6, 1, 1e6])[:, None, None]
    factors[:, 0] = 0
    found = noisy_correlation(factors @ factors.swapaxes(1, 2), 0.25)
    assert (np.diagonal(found, axis1=1, axis2=2) == 1).all()
    assert np.linalg.eigvalsh(found).min() == pytest.approx(0.2, abs=EXACT)
    with pytest.raises(ConfigError, match=r"noise above 0, got 0; 0\.01"):
        noisy_correlation(np.eye(2), 0)


def test_likelihood_of_rank_1_is_that_of_normal_distributions() -> None:
    rng = np.random.default_rng(1)
    width = 5
    normal, written = correlation(rng, 3, 2, width), rng.standard_normal((4, 1, 2, width))
    found = log_likelihood_ratio(written, normal)
    for n, word in np.ndindex(4, 3):
        expected = 0.0
        for head in range(2):
            x, r = written[n, 0, head], normal[word, head]
            # The scale of the highest likelihood, under either model.
            scales = x @ np.linalg.solve(r, x) / width, x @ x / width
            ours, white = (
                multivariate_normal.logpdf(x, cov=scale * matrix)
                for scale, matrix in zip(scales, (r, np.eye(width)), strict=True)
            )
            expected += ours - white
        assert found[n, word] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_likelihood_is_of_the_update_however_it_is_split(rank: int) -> None:
    rng = np.random.default_rng(rank)
    heads, width, inputs = 2, 3, 9
    down = rng.standard_normal((2, rank, inputs))
    up = rng.standard_normal((2, heads * width, rank))
    normal = correlation(rng, 4, heads, width)
    mixing = rng.standard_normal((rank, 2 * rank))
    splits = [
        (down, up),
        (np.linalg.pinv(mixing) @ down, up @ mixing),
        (down / 7e3, up * 7e3),
        (np.concatenate([down, down], 1), np.concatenate([up, 0 * up], 2)),
    ]
    expected = np.zeros((2, 4))
    for n, word, head in np.ndindex(2, 4, heads):
        update = (up[n] @ down[n])[head * width : (head + 1) * width]
        moment, r = update @ update.T, normal[word, head]
        energy = np.trace(np.linalg.solve(r, moment)) / np.trace(moment)
        expected[n, word] -= 0.5 * (width * np.log(energy) + np.linalg.slogdet(r)[1])
    for a, b in splits:
        rows = update_directions(a, b).first
        found = log_likelihood_ratio(rows.reshape(2, -1, heads, width), normal)
        np.testing.assert_allclose(found, expected, atol=EXACT)


def test_a_head_without_update_adds_nothing() -> None:
    rng = np.random.default_rng(2)
    normal, written = correlation(rng, 3, 2, 4), rng.standard_normal((1, 2, 2, 4))
    one = log_likelihood_ratio(written[:, :, :1], normal[:, :1])
    written[:, :, 1] = 0
    np.testing.assert_allclose(log_likelihood_ratio(written, normal), one, atol=EXACT)
    assert (log_likelihood_ratio(0 * written, normal) == 0).all()
