"""`GaussianProcess`: regression on a kernel computed before, its noise by marginal likelihood."""

import math

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, check_X_y

from lora_ws.errors import ConfigError

# Noise to signal is sought in these bounds, times the kernel's mean eigenvalue: beyond them noise
# is below the rounding of float32 kernels, or nothing but noise is left.
BOUNDS = (1e-5, 1e5)
GRID = 100


class GaussianProcess(RegressorMixin, BaseEstimator):
    """Gaussian-process regression on a precomputed kernel K, of one or several outputs.

    Outputs are independent draws from ``N(0, signal K + noise I)``. Their two variances maximise
    the marginal likelihood of all outputs (Rasmussen and Williams 2006, chapters 2 and 5): one
    eigendecomposition makes it a function of the ratio noise / signal alone, as the best signal
    for a ratio has a closed form. Predictions are the posterior mean, which is kernel ridge with
    that ratio as its ``alpha``: nothing is left to choose. Classes are read by regression on their
    indicators (there, 6.5): exact, where a softmax likelihood would need approximations.

    Args:
        noise: noise / signal; None maximises the marginal likelihood.

    Attributes:
        dual_coef_: of each training row ``[rows, outputs]``.
        ratio_: noise / signal.
        signal_: variance of the kernel's draws.
        log_marginal_likelihood_: of all outputs, in nats.

    Example:
        >>> x = np.linspace(0, 1, 20)
        >>> K = np.exp(-8 * (x[:, None] - x) ** 2)
        >>> y = np.sin(6 * x)
        >>> bool(np.abs(GaussianProcess().fit(K, y).predict(K) - y).max() < 0.01)
        True
    """

    def __init__(self, *, noise: float | None = None) -> None:
        self.noise = noise

    def fit(
        self, X: Float[np.ndarray, "rows rows"], y: Float[np.ndarray, "..."]
    ) -> "GaussianProcess":
        """Find both variances, and what each training row adds to a prediction.

        Args:
            X: kernel of the training rows, symmetric and positive semi-definite.
            y: their targets, with a mean near 0.

        Raises:
            ConfigError: the noise is not above 0, or the kernel is not square or is 0.
        """
        kernel, y = check_X_y(X, y, multi_output=True, y_numeric=True, dtype="float64")
        if kernel.shape[0] != kernel.shape[1]:
            raise ConfigError(f"GaussianProcess: expected a square kernel, got {kernel.shape}")
        if self.noise is not None and self.noise <= 0:
            raise ConfigError(f"GaussianProcess(noise={self.noise}): expected above 0; use None")
        values, vectors = np.linalg.eigh(kernel)
        values = np.maximum(values, 0.0)
        if not values.any():
            raise ConfigError("GaussianProcess: expected a kernel that is not 0 everywhere")
        turned = vectors.T @ np.asarray(y, np.float64).reshape(len(y), -1)
        self.ratio_ = _best_ratio(values, turned) if self.noise is None else self.noise
        self.signal_ = _signal(values, turned, self.ratio_)
        self.log_marginal_likelihood_ = -_cost(values, turned, self.ratio_)
        coefficients = vectors @ (turned / (values + self.ratio_)[:, None])
        self.dual_coef_ = coefficients.reshape(y.shape)
        return self

    def predict(self, X: Float[np.ndarray, "rows training"]) -> Float[np.ndarray, "..."]:
        """Posterior mean of new rows.

        Args:
            X: their kernel with each training row.
        """
        check_is_fitted(self)
        return np.asarray(X, np.float64) @ self.dual_coef_

    def __sklearn_tags__(self) -> Tags:
        """Tell scikit-learn that columns are training rows."""
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        tags.target_tags.multi_output = True
        return tags


def _best_ratio(values: np.ndarray, turned: np.ndarray) -> float:
    """Of a grid, the ratio of the highest likelihood, then the best between its neighbours."""
    low, high = (math.log(bound * values.mean()) for bound in BOUNDS)
    grid = np.linspace(low, high, GRID)
    best = int(np.argmin([_cost(values, turned, math.exp(log)) for log in grid]))
    between = (grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)])
    found = minimize_scalar(
        lambda log: _cost(values, turned, math.exp(log)),
        bounds=between,
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(found.x)  # type: ignore[union-attr]


def _signal(values: np.ndarray, turned: np.ndarray, ratio: float) -> float:
    """The variance of highest likelihood; the smallest positive number where targets are 0."""
    squares = np.square(turned) / (values + ratio)[:, None]
    return max(float(squares.mean()), float(np.finfo(np.float64).tiny))


def _cost(values: np.ndarray, turned: np.ndarray, ratio: float) -> float:
    """Minus the log marginal likelihood, of eigenvalues and targets in their basis."""
    rows, outputs = turned.shape
    spread = np.log(_signal(values, turned, ratio) * (values + ratio)).sum()
    return float(outputs / 2 * (spread + rows * (1 + math.log(2 * math.pi))))
