"""Inner products of low-rank updates ``up @ down``, from their factors alone.

Every kernel here is one formula, ``K_ij = sum_pq (p_ip . p_jq) (q_ip . q_jq)``, over two sets of
directions of an update dW, and neither depends on how dW was split into factors:

* ``delta``, <dW_i, dW_j>: both sides of ``dW = sum_p p_p q_p^T``;
* ``left``, <dW_i dW_i^T, dW_j dW_j^T>: what the updates write, blind to what they read;
* ``right``, <dW_i^T dW_i, dW_j^T dW_j>: what they read, blind to what they write.

``left`` and ``right`` are the projection kernel of Hamm and Lee (2008, "Grassmann discriminant
analysis") with the directions weighted by their singular values.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError
from lora_ws.functional.factors import orthonormal_rows
from lora_ws.functional.whitening import whitener

Kernel = Literal["left", "right", "delta"]
KERNELS: tuple[Kernel, ...] = ("left", "right", "delta")
# An update this much smaller than the largest of its adapter is taken for rounding noise.
NEGLIGIBLE = 1e-4
# So many times fewer rows than others are multiplied from the right.
_FEW = 4


class Directions(NamedTuple):
    """Directions of the updates of one layer as rows; for one side alone, both are the same."""

    first: Float[np.ndarray, "n rank d"]
    second: Float[np.ndarray, "n rank e"]


def update_directions(
    down: Float[np.ndarray, "n rank in_features"],
    up: Float[np.ndarray, "n out_features rank"],
    kernel: Kernel = "left",
) -> Directions:
    """Directions whose products make a kernel, from the factors of one layer.

    A QR decomposition of one factor moves its scale into the other, so that another split of the
    same update (``up @ G`` and ``inv(G) @ down``) and zero rows and columns change no kernel.

    Args:
        down: Finite factors A ``[n, rank, in_features]``.
        up: Finite factors B ``[n, out_features, rank]``.
        kernel: One of ``KERNELS``.

    Returns:
        Float64 directions. ``left``: rows l with ``dW dW^T = sum l l^T``; ``right``: rows r with
        ``dW^T dW = sum r r^T``; ``delta``: rows l and q with ``dW = sum l q^T``.

    Raises:
        ConfigError: If the kernel is unknown or the shapes do not match.

    Example:
        >>> down, up = np.array([[[3.0, 4.0]]]), np.array([[[2.0], [0.0], [0.0]]])
        >>> abs(update_directions(down, up, "left").first)
        array([[[10., 0., 0.]]])
    """
    check_kernel(kernel)
    if down.ndim != 3 or up.ndim != 3 or down.shape[:2] != (up.shape[0], up.shape[2]):
        raise ConfigError(
            f"expected factors [n, rank, in] and [n, out, rank], got {down.shape} and {up.shape}; "
            "pass A and B of the same adapters"
        )
    columns = up.transpose(0, 2, 1)
    one, other = (columns, down) if kernel == "right" else (down, columns)
    mixing, basis = orthonormal_rows(one, basis=kernel == "delta")
    moved = mixing.transpose(0, 2, 1) @ other.astype(np.float64)
    return Directions(moved, basis if kernel == "delta" else moved)


def update_norms(
    down: Float[np.ndarray, "n rank in_features"], up: Float[np.ndarray, "n out_features rank"]
) -> Float[np.ndarray, " n"]:
    """Frobenius norms of ``up @ down``.

    Args:
        down: Finite factors A ``[n, rank, in_features]``.
        up: Finite factors B ``[n, out_features, rank]``.

    Returns:
        Float64 norms ``[n]``.

    Raises:
        ConfigError: If the shapes do not match.

    Example:
        >>> update_norms(np.array([[[3.0, 4.0]]]), np.array([[[2.0], [0.0]]]))
        array([10.])
    """
    return direction_norms(update_directions(down, up, "left").first)


def direction_norms(directions: Float[np.ndarray, "n rank d"]) -> Float[np.ndarray, " n"]:
    """Root of the sum of squares of each adapter, without over- or underflow on the way.

    Args:
        directions: Rows ``[n, rank, d]``.

    Returns:
        Norms ``[n]`` in the dtype of the rows.

    Example:
        >>> direction_norms(np.array([[[3e200, 4e200]]]))
        array([5.e+200])
    """
    squares = np.einsum("npd,npd->n", directions, directions)
    limits = np.finfo(squares.dtype)
    # What these squares lose is below their rounding; a 0 may be an underflow.
    if ((squares > limits.tiny / limits.eps**2) & (squares < limits.max)).all():
        return np.sqrt(squares)
    largest = _safe(np.abs(directions).max(axis=(1, 2), initial=0.0))
    return largest * np.sqrt(((directions / largest[:, None, None]) ** 2).sum(axis=(1, 2)))


def negligible_layers(
    norms: Float[np.ndarray, "n layers"], ratio: float = NEGLIGIBLE
) -> np.ndarray:
    """Which layers of each adapter hold rounding noise: next to nothing beside its largest layer.

    A layer without gradient (attention over a single token, for instance) keeps an update that only
    rounding moved. Scaling every layer to unit norm would make that noise as loud as the rest.

    Args:
        norms: Frobenius norms of the updates ``[n, layers]``.
        ratio: Up to which fraction of the adapter's largest norm per layer counts as noise.

    Returns:
        A boolean array ``[n, layers]``, true also for updates of exactly 0.

    Example:
        >>> negligible_layers(np.array([[2.0, 1e-7], [0.0, 0.0]]))
        array([[False,  True], [ True,  True]])
    """
    return norms <= ratio * norms.max(axis=1, keepdims=True)


def unit_updates(
    directions: Float[np.ndarray, "n rank d"],
) -> Float[np.ndarray, "n rank d"]:
    """Directions scaled so that the squares of an adapter sum to 1; zeros stay zeros.

    Args:
        directions: Rows ``[n, rank, d]``.

    Returns:
        A new array of the same shape.

    Example:
        >>> unit_updates(np.array([[[3.0, 4.0]], [[0.0, 0.0]]])).round(1).tolist()
        [[[0.6, 0.8]], [[0.0, 0.0]]]
    """
    return directions / _safe(direction_norms(directions))[:, None, None]


def unit_kernel(directions: Directions) -> Directions:
    """Directions scaled so that the kernel of every adapter with itself is 1; zeros stay zeros.

    Args:
        directions: Of one layer.

    Returns:
        New directions of the same shapes.

    Example:
        >>> rows = np.array([[[3.0, 4.0]]])
        >>> unit_kernel(Directions(rows, rows)).first.round(1)
        array([[[0.6, 0.8]]])
    """
    # To unit length first: a fourth power neither underflows nor overflows then.
    first = unit_updates(directions.first)
    same = directions.second is directions.first
    second = first if same else unit_updates(directions.second)
    products = [rows @ rows.transpose(0, 2, 1) for rows in ((first,) if same else (first, second))]
    own = np.einsum("npq,npq->n", products[0], products[-1])
    scale = _safe(np.maximum(own, 0) ** 0.25)[:, None, None]
    scaled = first / scale
    return Directions(scaled, scaled if same else second / scale)


def second_moment(directions: Float[np.ndarray, "n rank d"]) -> Float[np.ndarray, "d d"]:
    """Sum over adapters of the outer products of their directions, each adapter scaled to unit.

    Args:
        directions: Rows ``[n, rank, d]``.

    Returns:
        A float64 matrix ``[d, d]``, whose trace is the number of adapters that are not zero.

    Example:
        >>> second_moment(np.array([[[3.0, 4.0]]])).round(2)
        array([[0.36, 0.48], [0.48, 0.64]])
    """
    rows = unit_updates(directions).reshape(-1, directions.shape[2])
    return rows.T @ rows


def directions_gram(mine: Directions, others: Directions | None = None) -> Float[np.ndarray, "n m"]:
    """The kernel between the adapters of two sets of directions of the same layer.

    Args:
        mine: Of n adapters.
        others: Of m adapters; None takes ``mine``.

    Returns:
        A float64 matrix ``[n, m]``; products are in the dtype of the directions.

    Example:
        >>> rows = np.array([[[1.0, 0.0]], [[1.0, 2.0]]])
        >>> directions_gram(Directions(rows, rows))
        array([[ 1.,  1.], [ 1., 25.]])
    """
    others = mine if others is None else others
    same = mine.first is mine.second and others.first is others.second
    seconds = None if same else (mine.second, others.second)
    return shared_grams(mine.first, others.first, [seconds])[0]


def shared_grams(
    mine: Float[np.ndarray, "n rank d"],
    others: Float[np.ndarray, "m rank2 d"],
    seconds: Sequence[tuple[np.ndarray, np.ndarray] | None],
) -> list[Float[np.ndarray, "n m"]]:
    """Several kernels of one layer whose first directions are the same: these meet only once.

    Args:
        mine: First directions of n adapters.
        others: Those of m adapters. Rows of one rank after another are read where they are, so
            that a slice of a larger array is not copied.
        seconds: Second directions of both, for each kernel; None takes the first ones again.

    Returns:
        Float64 matrices ``[n, m]``, one a kernel; products are in the dtype of the directions.

    Example:
        >>> rows = np.array([[[1.0, 0.0]], [[1.0, 2.0]]])
        >>> shared_grams(rows, rows, [None])[0]
        array([[ 1.,  1.], [ 1., 25.]])
    """
    n, rank, width = mine.shape
    grams = [np.zeros((n, len(others))) for _ in seconds]
    for k in range(others.shape[1]):
        product = _products(mine.reshape(-1, width), others[:, k])
        for gram, second in zip(grams, seconds, strict=True):
            factor = product
            if second is not None:
                factor = _products(second[0].reshape(n * rank, -1), second[1][:, k])
            # Squares of single precision may leave its range.
            gram += np.einsum(
                "npm,npm->nm",
                product.reshape(n, rank, -1),
                factor.reshape(n, rank, -1),
                dtype=np.float64,
            )
    return grams


def delta_gram(
    down: Float[np.ndarray, "n rank in_features"],
    up: Float[np.ndarray, "n out_features rank"],
    kernel: Kernel = "left",
    *,
    normalize: bool = True,
    whiten: float | None = None,
) -> Float[np.ndarray, "n n"]:
    """The kernel matrix of the updates of one layer, exact, without forming an update.

    Args:
        down: Finite factors A ``[n, rank, in_features]``.
        up: Finite factors B ``[n, out_features, rank]``.
        kernel: One of ``KERNELS``.
        normalize: Divide by ``sqrt(K_ii K_jj)``; an update of 0 gives zeros.
        whiten: Scale each update to unit norm and whiten the side that it writes (for ``right``:
            that it reads) by the second moment of all of them with this shrinkage.

    Returns:
        A float64 matrix ``[n, n]``.

    Raises:
        ConfigError: If an argument cannot be used.

    Example:
        >>> down, up = np.array([[[1.0, 0.0]], [[2.0, 0.0]]]), np.array([[[1.0]], [[-3.0]]])
        >>> delta_gram(down, up, "delta", normalize=False)
        array([[ 1., -6.], [-6., 36.]])
        >>> delta_gram(down, up, "left").round(3)
        array([[1., 1.], [1., 1.]])
    """
    directions = update_directions(down, up, kernel)
    if whiten is not None:
        directions = whitened(directions, whitener(second_moment(directions.first), whiten), kernel)
    return directions_gram(unit_kernel(directions) if normalize else directions)


def whitened(
    directions: Directions, matrix: Float[np.ndarray, "d d"], kernel: Kernel
) -> Directions:
    """Updates scaled to unit norm, their first side multiplied by a matrix.

    Args:
        directions: Of one layer, as ``update_directions`` returns them.
        matrix: Such as `whitener` returns ``[d, d]``.
        kernel: Which kernel the directions are for.

    Returns:
        New directions of the same shapes.

    Example:
        >>> rows = np.array([[[3.0, 4.0]]])
        >>> whitened(Directions(rows, rows), 2 * np.eye(2), "left").second.round(1)
        array([[[1.2, 1.6]]])
    """
    first = unit_updates(directions.first) @ matrix
    return Directions(first, directions.second if kernel == "delta" else first)


def check_kernel(kernel: str) -> None:
    """Refuse what is not a kernel.

    Raises:
        ConfigError: If the kernel is unknown.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"expected a kernel of {', '.join(KERNELS)}, got {kernel!r}")


def _products(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of every row with every other ``[n, m]``."""
    if _FEW * len(mine) > len(others):
        return mine @ others.T
    # BLAS rearranges the matrix on the right before it multiplies: with few rows, these.
    return np.ascontiguousarray((others @ mine.T).T)


def _safe(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 1.0)
