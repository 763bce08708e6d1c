"""Principal components in the space of a kernel, from inner products with some of the rows."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lora_ws.errors import ConfigError


class KernelPcaResult(NamedTuple):
    """A fitted kernel PCA; the scores of a row are ``kernel with the landmarks @ dual - offset``.

    Components stand in order of falling variance; those beyond the numerical rank are zero.

    Example:
        >>> from lora_ws.functional import kernel_pca
        >>> rows = np.random.default_rng(0).standard_normal((6, 4))
        >>> kernel_pca(rows @ rows.T, 2).scores.shape
        (6, 2)
    """

    dual: Float[np.ndarray, "m k"]
    offset: Float[np.ndarray, " k"]
    eigenvalues: Float[np.ndarray, " k"]
    scores: Float[np.ndarray, "n k"]


def kernel_pca(
    gram: Float[np.ndarray, "n m"],
    n_components: int,
    *,
    landmarks: Int[np.ndarray, " m"] | None = None,
    noise: float = 1e-7,
) -> KernelPcaResult:
    """Leading principal components of the rows, centred, in the space of the kernel.

    With the kernel between all rows this is kernel PCA (Schölkopf, Smola and Müller 1998): the
    eigenvectors of the doubly centred matrix. With the kernel to some rows only, the landmarks,
    every row is first projected on their span (Nyström; Williams and Seeger 2001).

    Args:
        gram: Kernel of n rows with m landmarks ``[n, m]``, float64; square and symmetric without
            ``landmarks``.
        n_components: How many components k, from 1 to min(n - 1, m).
        landmarks: Which of the n rows the landmarks are; None where they are all of them.
        noise: Eigenvalues up to this fraction of the largest one of the uncentred kernel are
            rounding: their components become zero.

    Returns:
        The fit, in float64. The largest entry of each column of ``dual`` is positive.

    Raises:
        ConfigError: If the shapes do not match or n_components is out of range.

    Example:
        >>> x = np.array([[0.0], [1.0], [5.0]])
        >>> abs(kernel_pca(x @ x.T, 1).scores).round(6).ravel()
        array([2., 1., 3.])
    """
    _check(gram, n_components, landmarks)
    if landmarks is None:
        fit = _exact(gram, n_components, noise)
    else:
        fit = _nystrom(gram, gram[landmarks], n_components, noise)
    rows = np.abs(fit.dual).argmax(axis=0)
    signs = np.where(fit.dual[rows, np.arange(n_components)] < 0, -1.0, 1.0)
    return fit._replace(dual=fit.dual * signs, offset=fit.offset * signs, scores=fit.scores * signs)


def _exact(gram: np.ndarray, k: int, noise: float) -> KernelPcaResult:
    mean, largest = gram.mean(axis=0), float(np.trace(gram))
    centred = gram - mean
    centred -= centred.mean(axis=1, keepdims=True)
    values, vectors = _leading(centred, k)
    real = values > noise * largest / len(gram)
    roots = np.sqrt(np.where(real, values, 1.0))
    vectors = np.where(real, vectors, 0.0)
    dual = vectors / roots
    values = np.where(real, values, 0.0)
    return KernelPcaResult(dual, mean @ dual, values, vectors * roots)


def _nystrom(gram: np.ndarray, square: np.ndarray, k: int, noise: float) -> KernelPcaResult:
    values, vectors = _leading((square + square.T) / 2, len(square))
    real = values > noise * max(values[0], 0.0)
    # Coordinates in the span of the landmarks: inner products there are the kernel.
    into = np.where(real, vectors, 0.0) / np.sqrt(np.where(real, values, 1.0))
    coordinates = gram @ into
    mean = coordinates.mean(axis=0)
    coordinates -= mean
    values, vectors = _leading(coordinates.T @ coordinates, k)
    values = np.maximum(values, 0.0)
    vectors = np.where(values > noise * values[0], vectors, 0.0)
    return KernelPcaResult(into @ vectors, mean @ vectors, values, coordinates @ vectors)


def _leading(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh  # slow to import, and only fitting needs it

    size = len(matrix)
    values, vectors = eigh(matrix, subset_by_index=(size - k, size - 1))
    return values[::-1], vectors[:, ::-1]


def _check(gram: np.ndarray, n_components: int, landmarks: np.ndarray | None) -> None:
    n, m = gram.shape
    if (n != m) if landmarks is None else (len(landmarks) != m):
        raise ConfigError(
            f"expected a column for each landmark, got a kernel of shape {gram.shape} with "
            f"{n if landmarks is None else len(landmarks)} landmarks; pass landmarks=... of its "
            "columns"
        )
    most = min(n - 1, m)
    if not 1 <= n_components <= most:
        raise ConfigError(
            f"expected n_components from 1 to min(n - 1, m) = {most}, got {n_components}; ask for "
            "fewer components or fit on more rows"
        )
