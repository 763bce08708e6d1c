"""Leading eigenpairs of a symmetric matrix that is only applied to blocks of vectors."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError

_MIB = 1 << 20
# Random directions beyond the wanted ones, so that the last wanted one converges as well.
_OVERSAMPLING = 8


def leading_eigenpairs(
    apply: Callable[[Float[np.ndarray, "d l"]], Float[np.ndarray, "d l"]],
    size: int,
    count: int,
    *,
    dtype: np.dtype | type = np.float64,
    available: int = 1 << 32,
    tol: float = 1e-6,
    passes: int = 6,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "d k"]]:
    """Largest eigenvalues and their vectors, by block Lanczos.

    Each step applies the matrix to as many new vectors as are wanted and a few more, with full
    reorthogonalisation (Golub and Underwood 1977); few steps are within a small factor of the best
    whatever the gaps of the spectrum (Musco and Musco 2015). Where memory holds no further block,
    the basis is replaced by the best vectors found in it (thick restart, Wu and Simon 2000).

    Args:
        apply: the matrix times a block of vectors.
        size: rows of the matrix d.
        count: how many eigenpairs k.
        dtype: of the vectors; eigenvalues are float64.
        available: bytes for the basis and a block's images.
        tol: largest residual of a wanted eigenpair, relative to the largest eigenvalue.
        passes: times the matrix is applied at most.
        seed: of the first block.

    Raises:
        ConfigError: memory does not hold two blocks.

    Example:
        >>> values, vectors = leading_eigenpairs(lambda v: np.arange(9.0)[:, None] * v, 9, 2)
        >>> values.round(6).tolist(), np.abs(vectors).argmax(axis=0).tolist()
        ([8.0, 7.0], [8, 7])
    """
    # At least as many vectors as wanted: no repeated eigenvalue can then be missed.
    width = min(count + _OVERSAMPLING, size)
    most = _blocks_that_fit(size, width, np.dtype(dtype).itemsize, available)
    start = np.random.default_rng(seed).standard_normal((size, width)).astype(dtype)
    basis, projected = [_orthonormal(start)[0]], np.zeros((0, 0))
    values, weights = np.zeros(0), np.zeros((0, 0))
    for done in range(1, passes + 1):
        image, column = _orthogonalize(apply(basis[-1]), basis)
        above, corner = column[: len(projected)], column[len(projected) :]
        projected = np.block([[projected, above], [above.T, (corner + corner.T) / 2]])
        values, weights = np.linalg.eigh(projected)
        values, weights = values[::-1][:width], weights[:, ::-1][:, :width]
        if done == passes:
            break
        new, coupling = _range(image, 1e-11 * abs(values[0]))
        residuals = np.linalg.norm(coupling @ weights[-basis[-1].shape[1] :, :count], axis=0)
        if residuals.max(initial=0.0) <= tol * abs(values[0]):
            break
        if len(basis) == most:
            basis, projected = [_combine(basis, weights)], np.diag(values)
        # Small directions carry the rounding of large ones, which is not orthogonal to the basis.
        basis.append(_orthonormal(_orthogonalize(new, basis)[0])[0])
    return values[:count], _combine(basis, weights[:, :count])


def _blocks_that_fit(size: int, width: int, itemsize: int, available: int) -> int:
    """Blocks of the basis, beside an image, its sum, its range, and a basis that is combined."""
    block = size * width * itemsize
    most = available // block - 5
    if most < 2 and size > width:
        raise ConfigError(
            f"expected memory for two blocks of {width} vectors of {size} numbers, which take "
            f"{7 * block // _MIB + 1} MiB, got {available // _MIB}; raise the memory or ask for "
            "fewer components"
        )
    return max(most, 2)


def _combine(basis: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Vectors from their coefficients in the basis."""
    found, start = np.zeros((len(basis[0]), weights.shape[1]), basis[0].dtype), 0
    for part in basis:
        stop = start + part.shape[1]
        found += part @ weights[start:stop].astype(part.dtype)
        start = stop
    return found


def _orthogonalize(image: np.ndarray, basis: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The image without its part in the basis, and that part's coefficients in float64."""
    coefficients = [np.zeros((part.shape[1], image.shape[1])) for part in basis]
    # Once leaves rounding of the size of what was removed; twice is enough (Kahan).
    for _ in range(2):
        for part, total in zip(basis, coefficients, strict=True):
            step = part.T @ image
            image = image - part @ step
            total += step
    return image, np.concatenate(coefficients)


def _range(image: np.ndarray, negligible: float) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis of what is left of the image, and the image in that basis."""
    across, square = _orthonormal(image)
    left, singular, right = np.linalg.svd(square)
    rank = int((singular > negligible).sum())
    return across @ left[:, :rank], singular[:rank, None] * right[:rank]


def _orthonormal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors Q and R, in the dtype of the vectors, where NumPy would compute in float64."""
    from scipy.linalg import qr  # slow to import, and only fitting needs it

    found: Any = qr(vectors, mode="economic", check_finite=False)
    return found
