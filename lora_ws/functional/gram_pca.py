"""Principal components of matrices too large to copy, in passes over their rows."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError
from lora_ws.functional.krylov import leading_eigenpairs
from lora_ws.functional.rows import Rows, row_blocks
from lora_ws.functional.standardize import column_moments, safe_scale, standardize

_MIB = 1 << 20
_BLOCK_COLUMNS = 4096
_STRIP_ROWS = 1024
_ROW_BLOCK_BYTES = 64 * _MIB
# Up to this smaller side the matrix of inner products costs less than passes over the rows.
_EXACT_SIDE = 5000


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

    x: np.ndarray | Rows
    mean: np.ndarray
    scale: np.ndarray
    block_bytes: int

    def rows(self, most: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Consecutive blocks of rows of so many bytes, each overwritten by the next."""
        most = min(self.block_bytes, _ROW_BLOCK_BYTES) if most is None else most
        step = max(1, most // (self.x.shape[1] * self.x.itemsize))
        for part, block in row_blocks(self.x, min(_BLOCK_COLUMNS, step)):
            yield part, standardize(block, self.mean, self.scale, out=block)

    def columns(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Consecutive blocks of columns, of a matrix that memory holds."""
        assert not isinstance(self.x, Rows)
        step = min(_BLOCK_COLUMNS, max(1, self.block_bytes // (len(self.x) * self.x.itemsize)))
        for start in range(0, self.x.shape[1], step):
            part = slice(start, start + step)
            yield part, standardize(self.x[:, part], self.mean[part], self.scale[part])


def pca(
    x: Float[np.ndarray, "n d"] | Rows,
    n_components: int,
    *,
    standardize: bool = True,
    solver: Literal["auto", "gram", "krylov"] = "auto",
    max_memory_mb: int = 4096,
    tol: float = 1e-6,
    passes: int = 6,
    seed: int = 0,
) -> PcaResult:
    """Leading principal components, reading rows in blocks and copying none of them for good.

    ``"gram"`` takes the eigenvectors of the n x n matrix of inner products of the centred rows, or
    of the d x d matrix of the columns where that is smaller (the method of snapshots, Sirovich
    1987). Products are in the dtype of ``x``, sums over blocks in float64. ``"krylov"`` does not
    form that matrix: it applies it to blocks of vectors (`leading_eigenpairs`), one pass over the
    rows each. After 6 passes a singular value is at most 2 % too low where the spectrum is flat,
    noise to the last component, and far less where it falls.

    Args:
        x: Finite float32 or float64 values ``[n, d]``: an array, a memory map, or rows of one.
        n_components: How many components k, from 1 to min(n - 1, d).
        standardize: Divide every column by its standard deviation (zero ones by 1).
        solver: ``"gram"``, ``"krylov"``, or ``"auto"``: gram up to a smaller side of 5000, where
            it fits the memory.
        max_memory_mb: Bound in MiB for working memory, the result not counted.
        tol: For krylov, largest residual of a wanted eigenpair relative to the largest eigenvalue.
        passes: For krylov, passes over the rows after which it stops, whatever the residual.
        seed: For krylov, seed of the first block of vectors.

    Returns:
        The fit: components and scores in the dtype of ``x``, the rest in float64. The largest entry
        of a component is positive; components beyond the numerical rank are zero.

    Raises:
        ConfigError: If an argument is out of range, or the memory does not suffice.

    Example:
        >>> fit = pca(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), 1, standardize=False)
        >>> fit.components.round(3), fit.scores.ravel().round(3)
        (array([[0.6, 0.8]]), array([-5.,  0.,  5.]))
    """
    x = _checked(x, n_components, solver)
    available = max_memory_mb * _MIB
    solver = _choose_solver(x, n_components, solver, max_memory_mb)
    matrix, total = _standardized(x, standardize, max(available // 8, 1))
    if solver == "krylov":
        values, vectors = leading_eigenpairs(
            lambda v: _apply(matrix, v),
            x.shape[1],
            n_components,
            dtype=x.dtype,
            available=available - matrix.block_bytes,
            tol=tol,
            passes=passes,
            seed=seed,
        )
        return _by_columns(matrix, values, vectors, total, solver)
    if len(x) > x.shape[1]:
        return _by_columns(matrix, *_eigenpairs(_column_gram(matrix), n_components), total, solver)
    held = not isinstance(x, Rows) and x.nbytes <= available // 4
    gram = _row_gram(matrix) if held else _panel_gram(matrix, available // 4)
    return _by_rows(matrix, *_eigenpairs(gram, n_components), total, held)


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
    x = x if isinstance(x, Rows) else np.asarray(x)
    if x.ndim != 2 or components.ndim != 2 or x.shape[1] != components.shape[1]:
        raise ConfigError(
            f"expected rows as wide as the components {components.shape}, got {x.shape}; "
            "project data of the layout that was fitted"
        )
    matrix = _Standardized(x, mean, scale, max(max_memory_mb * _MIB // 8, 1))
    return _scores(matrix, components)


def _scores(matrix: _Standardized, components: np.ndarray) -> np.ndarray:
    scores = np.empty((len(matrix.x), len(components)), matrix.x.dtype)
    across = components.T.astype(scores.dtype, copy=False)
    for rows, block in matrix.rows():
        scores[rows] = block @ across
    return scores


def _checked(x: np.ndarray | Rows, n_components: int, solver: str) -> np.ndarray | Rows:
    x = x if isinstance(x, Rows) else np.asarray(x)
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


def _standardized(
    x: np.ndarray | Rows, scaled: bool, block_bytes: int
) -> tuple[_Standardized, float]:
    """The matrix in blocks, and its sum of squares."""
    mean, std = column_moments(x)
    scale = safe_scale(std) if scaled else np.ones_like(std)
    total = (len(x) - 1) * float(((std / scale) ** 2).sum())
    return _Standardized(x, mean, scale, block_bytes), total


def _choose_solver(
    x: np.ndarray | Rows,
    n_components: int,
    solver: Literal["auto", "gram", "krylov"],
    max_memory_mb: int,
) -> Literal["gram", "krylov"]:
    """The Gram matrix where it is small and fits the memory, unless a solver is asked for."""
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
        return "gram" if fits and size <= _EXACT_SIDE else "krylov"
    return solver


def _eigenpairs(gram: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest, of a symmetric matrix of which the lower triangle is there (overwritten)."""
    from scipy.linalg import eigh  # slow to import, and only fitting needs it

    size = len(gram)
    # The transposed view is what LAPACK wants in memory, so it works in place, without a copy.
    wanted = (size - n_components, size - 1)
    values, vectors = eigh(
        gram.T, lower=False, subset_by_index=wanted, overwrite_a=True, check_finite=False
    )
    return values[::-1], vectors[:, ::-1]


def _row_gram(matrix: _Standardized) -> np.ndarray:
    """Inner products of rows that memory holds, by blocks of columns."""
    gram = np.zeros((len(matrix.x), len(matrix.x)))
    for _, block in matrix.columns():
        _add_gram(gram, block)
    return gram


def _column_gram(matrix: _Standardized) -> np.ndarray:
    """Inner products of columns, in one pass over the rows."""
    gram = np.zeros((matrix.x.shape[1], matrix.x.shape[1]))
    for _, block in matrix.rows():
        _add_gram(gram, block.T)
    return gram


def _panel_gram(matrix: _Standardized, most: int) -> np.ndarray:
    """Inner products of rows on disk: each panel that memory holds meets the rows before it."""
    gram = np.zeros((len(matrix.x), len(matrix.x)))
    width = matrix.x.shape[1]
    for panel_rows, panel in matrix.rows(most):
        before = matrix._replace(x=_head(matrix.x, panel_rows.start)).rows()
        for start in range(0, width, _BLOCK_COLUMNS):
            part = slice(start, start + _BLOCK_COLUMNS)
            _add_gram(gram[panel_rows, panel_rows], panel[:, part])
        for rows, block in before:
            for start in range(0, width, _BLOCK_COLUMNS):
                part = slice(start, start + _BLOCK_COLUMNS)
                gram[panel_rows, rows] += panel[:, part] @ block[:, part].T
    return gram


def _head(x: np.ndarray | Rows, count: int) -> np.ndarray | Rows:
    return Rows(x.matrix, x.index[:count], x.columns) if isinstance(x, Rows) else x[:count]


def _add_gram(gram: np.ndarray, block: np.ndarray) -> None:
    """Add block @ block.T to the lower triangle, in strips that bound the temporary product."""
    for start in range(0, len(block), _STRIP_ROWS):
        strip = block[start : start + _STRIP_ROWS]
        stop = start + len(strip)
        # Apart from the rest, because numpy halves the work of a product with its own transpose.
        gram[start:stop, start:stop] += strip @ strip.T
        if start:
            gram[start:stop, :start] += strip @ block[:start].T


def _apply(matrix: _Standardized, vectors: np.ndarray) -> np.ndarray:
    """The matrix of the columns times vectors, in one pass over the rows.

    Columns are centred in each block and scaled in the vectors, whose numbers are fewer.
    """
    dtype = matrix.x.dtype
    mean, scale = matrix.mean.astype(dtype), matrix.scale.astype(dtype)[:, None]
    narrow, image = vectors / scale, np.zeros(vectors.shape, dtype)
    step = max(1, matrix.block_bytes // (matrix.x.shape[1] * matrix.x.itemsize))
    for _, block in row_blocks(matrix.x, step):
        block -= mean
        image += block.T @ (block @ narrow)
    return image / scale


def _real(values: np.ndarray, size: int, dtype: np.dtype) -> np.ndarray:
    """Which eigenvalues are more than rounding, of the products or of the eigensolver."""
    noise = 4 * np.finfo(dtype).eps + size * np.finfo(np.float64).eps
    return values > noise * max(values[0], 0.0)


def _by_columns(
    matrix: _Standardized, values: np.ndarray, vectors: np.ndarray, total: float, solver: str
) -> PcaResult:
    """Complete a fit from the eigenpairs of the matrix of columns; the scores take a pass."""
    real = _real(values, len(vectors), matrix.x.dtype)
    components = np.where(real, vectors, 0).T.astype(matrix.x.dtype)
    values = np.where(real, values, 0.0)
    return _signed(matrix, components, _scores(matrix, components), values, total, solver)


def _by_rows(
    matrix: _Standardized, values: np.ndarray, vectors: np.ndarray, total: float, held: bool
) -> PcaResult:
    """Complete a fit from the eigenpairs of the matrix of rows; the components take a pass."""
    dtype = matrix.x.dtype
    real = _real(values, len(vectors), dtype)
    values, vectors = np.where(real, values, 0.0), np.where(real, vectors, 0.0)
    roots = np.sqrt(values)
    components = np.zeros((len(values), matrix.x.shape[1]), dtype)
    weights = (vectors / np.where(real, roots, 1.0)).T.astype(dtype)
    scores = (vectors * roots).astype(dtype)
    if held:
        for columns, block in matrix.columns():
            components[:, columns] = weights @ block
    else:
        for rows, block in matrix.rows():
            components += weights[:, rows] @ block
    return _signed(matrix, components, scores, values, total, "gram")


def _signed(
    matrix: _Standardized,
    components: np.ndarray,
    scores: np.ndarray,
    values: np.ndarray,
    total: float,
    solver: str,
) -> PcaResult:
    """The largest entry of a component is positive."""
    largest = np.abs(components).argmax(axis=1, keepdims=True)
    signs = np.where(np.take_along_axis(components, largest, axis=1) < 0, -1, 1)
    signs = signs.astype(components.dtype)
    components *= signs
    scores *= signs.T
    ratio = values / (total or 1.0)
    return PcaResult(matrix.mean, matrix.scale, components, np.sqrt(values), scores, ratio, solver)
