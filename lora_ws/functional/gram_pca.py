"""Exact principal components of matrices too large to copy."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError
from lora_ws.functional.standardize import column_moments, safe_scale, standardize

_MIB = 1 << 20
_BLOCK_COLUMNS = 4096
_STRIP_ROWS = 1024
_ROW_BLOCK_BYTES = 64 * _MIB
# Random directions beyond the wanted ones, so that the last wanted one converges as well.
_OVERSAMPLING = 8


class PcaResult(NamedTuple):
    """A fitted principal component analysis, components in order of falling variance.

    Example:
        >>> pca(np.random.default_rng(0).standard_normal((6, 40)), 2).components.shape
        (2, 40)
    """

    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]
    components: Float[np.ndarray, "k d"]
    singular_values: Float[np.ndarray, " k"]
    scores: Float[np.ndarray, "n k"]
    explained_variance_ratio: Float[np.ndarray, " k"]
    solver: str


class _Standardized(NamedTuple):
    """A matrix with the mean and scale of its columns, read in standardised blocks."""

    x: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    block_bytes: int

    @property
    def side(self) -> int:
        """The smaller side of the matrix, which is where the eigenvectors live."""
        return 0 if self.x.shape[0] <= self.x.shape[1] else 1

    def blocks(self, axis: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Consecutive blocks of rows (axis 0) or columns (axis 1)."""
        other = self.x.shape[1 - axis] * self.x.itemsize
        most = self.block_bytes if axis else min(self.block_bytes, _ROW_BLOCK_BYTES)
        step = min(_BLOCK_COLUMNS, max(1, most // other))
        for start in range(0, self.x.shape[axis], step):
            part = slice(start, start + step)
            columns = part if axis else slice(None)
            block = self.x[:, part] if axis else self.x[part]
            yield part, standardize(block, self.mean[columns], self.scale[columns])


def pca(
    x: Float[np.ndarray, "n d"],
    n_components: int,
    *,
    standardize: bool = True,
    solver: Literal["auto", "gram", "krylov"] = "auto",
    max_memory_mb: int = 4096,
    tol: float = 1e-6,
    seed: int = 0,
) -> PcaResult:
    """Leading principal components, reading ``x`` in blocks and never copying it.

    ``"gram"`` takes the eigenvectors of the n x n matrix of inner products of the centred rows, or
    of the d x d matrix of the columns where that is smaller (the method of snapshots, Sirovich
    1987). Products are in the dtype of ``x``, sums over blocks in float64. ``"krylov"`` does not
    form that matrix: it applies it to blocks of vectors (block Lanczos with full
    reorthogonalisation, Golub and Underwood 1977), one pass over ``x`` each, until the wanted
    eigenpairs are accurate.

    Args:
        x: Finite float32 or float64 values ``[n, d]``, an array or a memory map.
        n_components: How many components k, from 1 to min(n - 1, d).
        standardize: Divide every column by its standard deviation (zero ones by 1).
        solver: ``"gram"``, ``"krylov"``, or ``"auto"``: gram where it fits the memory.
        max_memory_mb: Bound in MiB for working memory, the result not counted.
        tol: For krylov, largest residual of a wanted eigenpair relative to the largest eigenvalue.
        seed: For krylov, seed of the first block of vectors.

    Returns:
        The fit: components and scores in the dtype of ``x``, the rest in float64. The largest entry
        of a component is positive; components beyond the numerical rank are zero.

    Raises:
        ConfigError: If an argument is out of range, the memory does not suffice, or krylov did not
            converge within it.

    Example:
        >>> fit = pca(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), 1, standardize=False)
        >>> fit.components.round(3), fit.scores.ravel().round(3)
        (array([[0.6, 0.8]]), array([-5.,  0.,  5.]))
    """
    x = _checked(x, n_components, solver)
    solver = _choose_solver(x, n_components, solver, max_memory_mb)
    available = max_memory_mb * _MIB
    matrix, total = _standardized(x, standardize, max(available // 8, 1))
    if solver == "gram":
        pairs = _gram_eigenpairs(matrix, n_components)
    else:
        pairs = _krylov_eigenpairs(matrix, n_components, available // 2, tol, seed)
    return _result(matrix, pairs, total, solver)


def project(
    x: Float[np.ndarray, "m d"],
    mean: Float[np.ndarray, " d"],
    scale: Float[np.ndarray, " d"],
    components: Float[np.ndarray, "k d"],
    *,
    max_memory_mb: int = 4096,
) -> Float[np.ndarray, "m k"]:
    """Scores of rows, fitted or new, in the basis of the components, reading ``x`` in blocks.

    Args:
        x: Finite values ``[m, d]``, an array or a memory map.
        mean: Mean of the fit ``[d]``.
        scale: Scale of the fit ``[d]``.
        components: Components of the fit ``[k, d]``.
        max_memory_mb: Bound in MiB for working memory, the result not counted.

    Returns:
        Scores ``[m, k]`` in the dtype of ``x``.

    Raises:
        ConfigError: If the widths do not match.

    Example:
        >>> fit = pca(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]), 1)
        >>> project(np.array([[6.0, 1.0]]), fit.mean, fit.scale, fit.components)
        array([[2.]])
    """
    x = np.asarray(x)
    if x.ndim != 2 or components.ndim != 2 or x.shape[1] != components.shape[1]:
        raise ConfigError(
            f"expected rows as wide as the components {components.shape}, got {x.shape}; "
            "project data of the layout that was fitted"
        )
    matrix = _Standardized(x, mean, scale, max(max_memory_mb * _MIB // 8, 1))
    scores = np.empty((len(x), len(components)), x.dtype)
    for rows, block in matrix.blocks(axis=0):
        scores[rows] = block @ components.T.astype(x.dtype, copy=False)
    return scores


def _checked(x: np.ndarray, n_components: int, solver: str) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype not in (np.float32, np.float64):
        raise ConfigError(
            f"expected a float32 or float64 matrix [n, d], got {x.dtype} of shape {x.shape}; "
            "convert it with astype(np.float32)"
        )
    most = min(x.shape[0] - 1, x.shape[1])
    if not 1 <= n_components <= most:
        raise ConfigError(
            f"expected n_components from 1 to min(n - 1, d) = {most}, got {n_components}; "
            "ask for fewer components or fit on more rows"
        )
    if solver not in ("auto", "gram", "krylov"):
        raise ConfigError(f'expected "auto", "gram" or "krylov", got {solver!r}; take "auto"')
    return x


def _standardized(x: np.ndarray, scaled: bool, block_bytes: int) -> tuple[_Standardized, float]:
    """The matrix in blocks, and its sum of squares."""
    mean, std = column_moments(x)
    scale = safe_scale(std) if scaled else np.ones_like(std)
    total = (len(x) - 1) * float(((std / scale) ** 2).sum())
    return _Standardized(x, mean, scale, block_bytes), total


def _choose_solver(
    x: np.ndarray,
    n_components: int,
    solver: Literal["auto", "gram", "krylov"],
    max_memory_mb: int,
) -> Literal["gram", "krylov"]:
    """The Gram matrix where it fits the memory, unless a solver is asked for."""
    size = min(x.shape)
    # Peak of the Gram matrix, one strip of it and the eigenvectors, with a quarter for blocks.
    needed = (8 * size * (size + n_components + _STRIP_ROWS) * 4) // 3
    fits = needed <= max_memory_mb * _MIB
    if solver == "gram" and not fits:
        raise ConfigError(
            f"expected a Gram matrix within max_memory_mb={max_memory_mb}, got {x.shape}, which "
            f'needs {-(-needed // _MIB)} MiB; raise max_memory_mb or take solver="krylov"'
        )
    if solver == "auto":
        return "gram" if fits else "krylov"
    return solver


def _gram_eigenpairs(matrix: _Standardized, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh  # slow to import, and only fitting needs it

    side = matrix.side
    size = matrix.x.shape[side]
    gram = np.zeros((size, size))
    for _, block in matrix.blocks(axis=1 - side):
        _add_gram(gram, block.T if side else block)
    # The transposed view is what LAPACK wants in memory, so it works in place, without a copy.
    wanted = (size - n_components, size - 1)
    values, vectors = eigh(
        gram.T, lower=False, subset_by_index=wanted, overwrite_a=True, check_finite=False
    )
    return values[::-1], vectors[:, ::-1]


def _add_gram(gram: np.ndarray, block: np.ndarray) -> None:
    """Add block @ block.T to the lower triangle, in strips that bound the temporary product."""
    for start in range(0, len(block), _STRIP_ROWS):
        strip = block[start : start + _STRIP_ROWS]
        stop = start + len(strip)
        # Apart from the rest, because numpy halves the work of a product with its own transpose.
        gram[start:stop, start:stop] += strip @ strip.T
        if start:
            gram[start:stop, :start] += strip @ block[:start].T


def _krylov_eigenpairs(
    matrix: _Standardized, n_components: int, available: int, tol: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    size = matrix.x.shape[matrix.side]
    # At least as many vectors as wanted: no repeated eigenvalue can then be missed.
    width = min(n_components + _OVERSAMPLING, size)
    # Room for the basis twice (it is joined at the end), a block and its image.
    most = available // (16 * size) - 2 * width
    if most < min(2 * width, size):
        needed = 32 * size * 4 * width // _MIB + 1
        raise ConfigError(
            f"expected memory for at least {min(2 * width, size)} basis vectors of {size}, "
            f"got {max(most, 0)}; raise max_memory_mb to {needed} or ask for fewer components"
        )
    start = np.random.default_rng(seed).standard_normal((size, width))
    basis, projected = [np.linalg.qr(start)[0]], np.zeros((0, 0))
    while True:
        image, column = _orthogonalize(_apply(matrix, basis[-1]), basis)
        above, corner = column[: len(projected)], column[len(projected) :]
        projected = np.block([[projected, above], [above.T, (corner + corner.T) / 2]])
        values, weights = np.linalg.eigh(projected)
        values, weights = values[::-1][:n_components], weights[:, ::-1][:, :n_components]
        new, coupling = _range(image, 1e-11 * abs(values[0]))
        residuals = np.linalg.norm(coupling @ weights[-basis[-1].shape[1] :], axis=0)
        if residuals.max(initial=0.0) <= tol * abs(values[0]):
            return values, np.hstack(basis) @ weights
        if len(projected) + new.shape[1] > most:
            raise ConfigError(
                f"expected residuals of at most {tol:g}, got {residuals.max() / values[0]:.1e} "
                f"with the {len(projected)} basis vectors that memory allows; "
                "raise max_memory_mb or tol, or ask for fewer components"
            )
        # Small directions carry the rounding of large ones, which is not orthogonal to the basis.
        basis.append(np.linalg.qr(_orthogonalize(new, basis)[0])[0])


def _apply(matrix: _Standardized, vectors: np.ndarray) -> np.ndarray:
    """The Gram matrix of the smaller side times vectors, in one pass over the data."""
    side = matrix.side
    narrow = vectors.astype(matrix.x.dtype)
    image = np.zeros(vectors.shape)
    for _, block in matrix.blocks(axis=1 - side):
        across = block.T if side else block
        image += across @ (across.T @ narrow)
    return image


def _orthogonalize(image: np.ndarray, basis: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The image without its part in the basis, and that part's coefficients."""
    coefficients = [np.zeros((part.shape[1], image.shape[1])) for part in basis]
    # Once leaves rounding of the size of what was removed; twice is enough (Kahan).
    for _ in range(2):
        for part, total in zip(basis, coefficients, strict=True):
            step = part.T @ image
            image -= part @ step
            total += step
    return image, np.concatenate(coefficients)


def _range(image: np.ndarray, negligible: float) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis of what is left of the image, and the image in that basis."""
    left, singular, right = np.linalg.svd(image, full_matrices=False)
    rank = int((singular > negligible).sum())
    return left[:, :rank], singular[:rank, None] * right[:rank]


def _result(
    matrix: _Standardized, pairs: tuple[np.ndarray, ...], total: float, solver: str
) -> PcaResult:
    """Complete a fit from the eigenpairs of the smaller side."""
    values, vectors = pairs
    dtype = matrix.x.dtype
    # Below this an eigenvalue is rounding, of the products or of the eigensolver.
    noise = 4 * np.finfo(dtype).eps + len(vectors) * np.finfo(np.float64).eps
    real = values > noise * max(values[0], 0.0)
    values = np.where(real, values, 0.0)
    singular_values = np.sqrt(values)
    vectors = np.where(real, vectors, 0.0)
    if matrix.side:
        components, scores = vectors.T.astype(dtype), np.empty((len(matrix.x), len(values)), dtype)
        for rows, block in matrix.blocks(axis=0):
            scores[rows] = block @ components.T
    else:
        components = np.empty((len(values), matrix.x.shape[1]), dtype)
        weights = (vectors / np.where(real, singular_values, 1.0)).T.astype(dtype)
        scores = (vectors * singular_values).astype(dtype)
        for columns, block in matrix.blocks(axis=1):
            components[:, columns] = weights @ block
    largest = np.abs(components).argmax(axis=1, keepdims=True)
    signs = np.where(np.take_along_axis(components, largest, axis=1) < 0, -1, 1).astype(dtype)
    components *= signs
    scores *= signs.T
    ratio = values / (total or 1.0)
    return PcaResult(matrix.mean, matrix.scale, components, singular_values, scores, ratio, solver)
