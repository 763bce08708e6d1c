"""Column means and standard deviations of large matrices, and scaling with them."""

import numpy as np
from jaxtyping import Float, Int

from lora_ws.errors import ConfigError
from lora_ws.functional.rows import Rows

_TILE_COLUMNS = 2048
_BLOCK_BYTES = 64 << 20


def column_moments(
    x: Float[np.ndarray, "rows columns"] | Rows,
    rows: Int[np.ndarray, " chosen"] | None = None,
    block_rows: int = 128,
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """Mean and standard deviation (n - 1) of every column, reading the matrix once, row by row.

    Blocks of rows are merged by the update of Chan, Golub and LeVeque (1979) in float64, so that
    the result does not lose accuracy with the number of rows. A constant column has a mean of
    exactly its value and a standard deviation of exactly 0; so has every column of a single row.

    Args:
        x: Finite float32 or float64 values ``[rows, columns]``, possibly a memory map, or some
            rows of one.
        rows: Which rows to take, without copying them first; all by default.
        block_rows: How many rows to read at once.

    Returns:
        The mean and the standard deviation, float64 ``[columns]`` each.

    Raises:
        ConfigError: If ``x`` is no matrix, has no rows, or ``block_rows`` is not positive.

    Example:
        >>> column_moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
        (array([2., 5.]), array([1.41421356, 0.        ]))
    """
    x = x if isinstance(x, Rows) else np.asarray(x)
    count = len(x) if rows is None else len(rows)
    if x.ndim != 2 or count == 0 or block_rows < 1:
        raise ConfigError(
            "expected a matrix with at least one row and block_rows of at least 1, "
            f"got shape {x.shape} and block_rows={block_rows}; pass [rows, columns]"
        )
    if isinstance(x, Rows):
        # Of these a block is a copy; of an array each tile is.
        block_rows = max(1, min(block_rows, _BLOCK_BYTES // (x.itemsize * x.shape[1])))
    # Distances from the first row: equal values give exact zeros, close values no rounding.
    first = slice(0, 1) if rows is None else rows[:1]
    origin = x[first][0].astype(np.float64)
    mean, squares = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in range(0, count, block_rows):
        block = slice(start, start + block_rows)
        chosen = block if rows is None else rows[block]
        if isinstance(x, Rows):
            held, chosen = x[chosen], slice(None)
        else:
            held = x
        for left in range(0, x.shape[1], _TILE_COLUMNS):
            columns = slice(left, left + _TILE_COLUMNS)
            tile = held[chosen, columns] - origin[columns]
            _merge(mean[columns], squares[columns], start, tile)
    return origin + mean, np.sqrt(squares / max(count - 1, 1))


def _merge(
    mean: Float[np.ndarray, " columns"],
    squares: Float[np.ndarray, " columns"],
    seen: int,
    tile: Float[np.ndarray, "rows columns"],
) -> None:
    """Add the rows of ``tile`` (overwritten) to the mean and sum of squares of ``seen`` rows."""
    added = len(tile)
    tile_mean = tile.mean(axis=0)
    tile -= tile_mean
    shift = tile_mean - mean
    squares += np.einsum("ij,ij->j", tile, tile) + shift**2 * (seen * added / (seen + added))
    mean += shift * (added / (seen + added))


def safe_scale(std: Float[np.ndarray, " columns"]) -> Float[np.ndarray, " columns"]:
    """Standard deviations fit to divide by: zero and subnormal ones replaced by 1.

    Args:
        std: Standard deviations ``[columns]``.

    Returns:
        A new array of the same dtype.

    Example:
        >>> safe_scale(np.array([2.0, 0.0, 1e-310]))
        array([2., 1., 1.])
    """
    return np.where(std < np.finfo(std.dtype).tiny, std.dtype.type(1), std)


def standardize(
    x: Float[np.ndarray, "rows columns"],
    mean: Float[np.ndarray, " columns"],
    scale: Float[np.ndarray, " columns"],
    out: Float[np.ndarray, "rows columns"] | None = None,
) -> Float[np.ndarray, "rows columns"]:
    """(x - mean) / scale, computed in float64 and returned in the dtype of ``x``.

    Args:
        x: Values ``[rows, columns]``.
        mean: What to subtract ``[columns]``.
        scale: What to divide by, for instance from ``safe_scale`` ``[columns]``.
        out: Where to write, ``x`` itself too; a new array by default.

    Returns:
        ``out``: ``[rows, columns]`` in the dtype of ``x``.

    Raises:
        ConfigError: If the lengths do not match.

    Example:
        >>> standardize(np.float32([[1, 5], [3, 5]]), np.array([2.0, 5.0]), np.array([1.0, 1.0]))
        array([[-1.,  0.],
               [ 1.,  0.]], dtype=float32)
    """
    if not x.shape[-1:] == mean.shape == scale.shape:
        raise ConfigError(
            f"expected one mean and one scale for each of the columns, got {mean.shape} and "
            f"{scale.shape} for values of shape {x.shape}; fit them on data of the same width"
        )
    # numpy widens in small buffers here: float64 arithmetic without a float64 copy.
    how = {"dtype": np.float64, "casting": "same_kind"}
    result = np.subtract(x, mean, out=np.empty(x.shape, x.dtype) if out is None else out, **how)
    return np.divide(result, scale, out=result, **how)
