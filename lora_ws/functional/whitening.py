"""Whitening by a triangular matrix, which is kept, read and multiplied by without its zeros."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError

# Columns of a triangular matrix that are kept together, down to the last row that is not zero.
# Narrower panels have fewer zeros, and wider ones make faster products.
PANEL = 128


def whitener(moment: Float[np.ndarray, "d d"], shrinkage: float) -> Float[np.ndarray, "d d"]:
    """The upper triangular W with ``W @ W.T = inv((1 - shrinkage) M + shrinkage tr(M)/d I)``.

    M is scaled to unit mean diagonal first. Products of rows times W are those of rows times the
    symmetric inverse root (Kessy, Lewin and Strimmer 2018, "Optimal whitening and decorrelation").

    Directions that all adapters share say little about what tells them apart; whitening lowers
    them. Shrinkage (Ledoit and Wolf 2004) keeps directions that no training row has finite.

    Args:
        moment: Symmetric positive semi-definite ``[d, d]``; its scale does not matter.
        shrinkage: From 0 (excluded) to 1; 1 changes nothing.

    Returns:
        A float64 matrix ``[d, d]``; the identity if the moment is 0.

    Raises:
        ConfigError: If the shrinkage is out of range, or so small that rounding hides it.

    Example:
        >>> whitener(np.diag([3.0, 1.0]), 0.5).round(3)
        array([[0.894, 0.   ],
               [0.   , 1.155]])
    """
    if not 0 < shrinkage <= 1:
        raise ConfigError(
            f"expected a shrinkage above 0 and up to 1, got {shrinkage}; 0.1 is a good start"
        )
    # Not at the top: a bundle whitens without scipy.
    from scipy.linalg import solve_triangular

    width, trace = len(moment), float(np.trace(moment))
    if trace <= 0:
        return np.eye(width)
    shrunk = (1 - shrinkage) * moment * (width / trace) + shrinkage * np.eye(width)
    try:
        # No eigenvalue is below the shrinkage but for rounding.
        root = np.linalg.cholesky(shrunk)
    except np.linalg.LinAlgError:
        raise ConfigError(
            f"expected a shrinkage that rounding does not reach, got {shrinkage} for directions of "
            f"{width} numbers; use 1e-6 or more"
        ) from None
    return np.asarray(solve_triangular(root, np.eye(width), lower=True)).T


def packed_size(width: int) -> int:
    """How many values are kept of a matrix ``[width, width]``.

    Example:
        >>> packed_size(200)
        30784
    """
    return sum(end * (end - start) for start, end in _panels(width))


def packed(
    matrices: Iterable[Float[np.ndarray, "d d"]], widths: Sequence[int], dtype: np.dtype | type
) -> Float[np.ndarray, " values"]:
    """The panels of upper triangular matrices, one after the other.

    Args:
        matrices: Taken one by one, so that few need be held.
        widths: Of each matrix.
        dtype: Of the result.

    Example:
        >>> packed([np.triu(np.ones((200, 200)))], [200], np.float32).shape
        (30784,)
    """
    values = np.empty(sum(map(packed_size, widths)), dtype)
    places = unpacked(values, widths)
    for matrix, panels in zip(matrices, places, strict=True):
        for (start, end), panel in zip(_panels(len(matrix)), panels, strict=True):
            panel[:] = matrix[:end, start:end]
    return values


def unpacked(values: Float[np.ndarray, " values"], widths: Sequence[int]) -> list[list[np.ndarray]]:
    """The panels of each matrix, as views; earlier versions kept whole matrices, one panel each.

    Args:
        values: What `packed` made, or all values of all matrices.
        widths: Of each matrix d.

    Returns:
        Of each matrix, matrices ``[rows, columns]``, whose columns together are the d columns.

    Example:
        >>> [panel.shape for panel in unpacked(np.ones(30784), [200])[0]]
        [(128, 128), (200, 72)]
    """
    packs = len(values) == sum(map(packed_size, widths))
    found, at = [], 0
    for width in widths:
        panels = []
        for start, end in _panels(width) if packs else [(0, width)]:
            size = end * (end - start)
            panels.append(values[at : at + size].reshape(end, end - start))
            at += size
        found.append(panels)
    return found


def whitened_rows(
    rows: Float[np.ndarray, "n d"], panels: Sequence[np.ndarray]
) -> Float[np.ndarray, "n d"]:
    """Rows times the matrix of which these are the panels.

    Example:
        >>> whitened_rows(np.ones((1, 2)), [np.array([[1.0, 3.0], [0.0, 4.0]])])
        array([[1., 7.]])
    """
    out, start = np.empty_like(rows), 0
    for panel in panels:
        end = start + panel.shape[1]
        np.matmul(rows[:, : len(panel)], panel, out=out[:, start:end])
        start = end
    return out


def _panels(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]
