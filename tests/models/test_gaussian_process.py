"""Gaussian processes on precomputed kernels: those of scikit-learn, on the rows themselves."""

from typing import Any

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.utils import get_tags
from tolerances import EXACT

from lora_ws.errors import ConfigError
from lora_ws.models.gaussian_process import GaussianProcess


def data(outputs: int, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows, new rows, and targets linear in the rows but for noise."""
    rng = np.random.default_rng(outputs)
    rows, new = rng.standard_normal((24, 4)), rng.standard_normal((5, 4))
    targets = rows @ rng.standard_normal((4, outputs))
    return rows, new, targets + noise * rng.standard_normal(targets.shape)


def reference(signal: float, noise: float, optimizer: Any = None) -> Any:
    product = ConstantKernel(signal) * DotProduct(1.0, sigma_0_bounds="fixed")
    return GaussianProcessRegressor(product + WhiteKernel(noise), optimizer=optimizer, alpha=0.0)


@pytest.mark.parametrize("outputs", [1, 3])
def test_likelihood_and_posterior_mean_are_those_of_scikit_learn(outputs: int) -> None:
    rows, new, targets = data(outputs)
    kernel, asked = rows @ rows.T + 1, new @ rows.T + 1
    found = GaussianProcess().fit(kernel, targets)
    same = reference(found.signal_, found.signal_ * found.ratio_).fit(rows, targets)
    value = same.log_marginal_likelihood_value_
    assert found.log_marginal_likelihood_ == pytest.approx(value, rel=EXACT)
    expected = same.predict(new).reshape(5, outputs)
    np.testing.assert_allclose(found.predict(asked), expected, rtol=EXACT, atol=EXACT)
    # Gradient ascent from elsewhere climbs no higher, and comes as far.
    climbed = reference(1.0, 1.0, "fmin_l_bfgs_b").fit(rows, targets)
    assert climbed.log_marginal_likelihood_value_ <= found.log_marginal_likelihood_ + EXACT
    assert climbed.log_marginal_likelihood_value_ == pytest.approx(value, abs=1e-3)
    # The mean is that of ridge with the ratio.
    ridge: Any = KernelRidge(kernel="precomputed").set_params(alpha=found.ratio_)
    ridge.fit(kernel, targets)
    np.testing.assert_allclose(found.predict(asked), ridge.predict(asked), rtol=EXACT, atol=EXACT)


def test_noise_is_found_or_taken() -> None:
    rows, _, targets = data(40, noise=0.0)
    kernel = rows @ rows.T
    noisy = targets + 0.5 * np.random.default_rng(5).standard_normal(targets.shape)
    # Nine hundred independent numbers tell a variance to a twentieth of itself.
    found = GaussianProcess().fit(kernel, noisy)
    assert found.signal_ * found.ratio_ == pytest.approx(0.25, rel=0.2)
    assert GaussianProcess().fit(kernel, targets).ratio_ < 1e-3 * found.ratio_
    assert GaussianProcess(noise=3.0).fit(kernel, noisy).ratio_ == 3.0
    assert GaussianProcess().fit(kernel, noisy[:, 0]).dual_coef_.shape == (24,)
    assert get_tags(GaussianProcess()).input_tags.pairwise


@pytest.mark.parametrize(
    ("noise", "kernel", "message"),
    [
        (-1.0, np.eye(4), "noise=-1.0"),
        (None, np.eye(4)[:, :3], r"square kernel, got \(4, 3\)"),
        (None, np.zeros((4, 4)), "not 0 everywhere"),
    ],
)
def test_what_is_no_kernel_is_refused(
    noise: float | None, kernel: np.ndarray, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        GaussianProcess(noise=noise).fit(kernel, np.ones(4))
