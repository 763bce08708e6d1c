"""Products of two factors in a canonical form, and cut to a rank, without forming the product."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError

# How far the error of a basis that a Gram matrix gives stays below that of the rows.
GRAM_MARGIN = 64


class Cut(NamedTuple):
    """Factors of a product of some rank, and how much of it they hold.

    Attributes:
        down: A ``[rank, inputs]``.
        up: B ``[outputs, rank]``.
        kept: squared Frobenius norm of ``up @ down``.
        whole: that of the product before it was cut.
    """

    down: Float[np.ndarray, "rank inputs"]
    up: Float[np.ndarray, "outputs rank"]
    kept: float
    whole: float


def cut_to_rank(
    down: Float[np.ndarray, "r inputs"], up: Float[np.ndarray, "outputs r"], rank: int
) -> Cut:
    """The best product of a rank (Eckart and Young 1936), from QR decompositions of the factors.

    The factors of the result are orthogonal, share the singular values evenly, and depend on the
    product alone, up to a common sign of a column of B and the row of A; the entry of largest
    magnitude in each row of A is positive. A product of lower rank is padded with zeros.

    Args:
        down: A ``[r, inputs]``.
        up: B ``[outputs, r]``.
        rank: of the result.

    Returns:
        float64 factors and energies.

    Raises:
        ConfigError: the shapes do not match, or the rank is below 1.

    Example:
        >>> cut = cut_to_rank(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]), 1)
        >>> (cut.up @ cut.down).round(6).tolist(), cut.whole
        ([[6.0, 8.0], [0.0, 0.0]], 100.0)
    """
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or rank < 1:
        raise ConfigError(
            f"expected factors [r, inputs] and [outputs, r] and a rank above 0, got {down.shape}, "
            f"{up.shape} and {rank}"
        )
    # Sizes that cancel in the product would overflow or drown in the core.
    a, b = np.abs(down).max(initial=0.0), np.abs(up).max(initial=0.0)
    size = float(a) * float(b)
    if size == 0.0 or not np.isfinite(size):
        empty = Cut(np.zeros((rank, down.shape[1])), np.zeros((len(up), rank)), 0.0, 0.0)
        if size == 0.0:
            return empty
        raise ConfigError(f"expected finite factors, got entries up to {a:.3g} and {b:.3g}")
    written, left = np.linalg.qr(up.astype(np.float64) / b)
    read, right = np.linalg.qr((down.astype(np.float64) / a).T)
    u, values, v = np.linalg.svd(left @ right.T)
    values = values * size
    k = min(rank, len(values))
    roots = np.sqrt(values[:k])
    up_cut = np.zeros((len(up), rank))
    down_cut = np.zeros((rank, down.shape[1]))
    up_cut[:, :k] = (written @ u[:, :k]) * roots
    down_cut[:k] = roots[:, None] * (v[:k] @ read.T)
    largest = np.abs(down_cut).argmax(axis=1)
    signs = np.where(down_cut[np.arange(rank), largest] < 0, -1.0, 1.0)
    energy = np.square(values)
    return Cut(
        down_cut * signs[:, None], up_cut * signs, float(energy[:k].sum()), float(energy.sum())
    )


def product_energy(
    down: Float[np.ndarray, "r inputs"], up: Float[np.ndarray, "outputs r"]
) -> float:
    """Squared Frobenius norm of ``up @ down``, in float64.

    Example:
        >>> product_energy(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]))
        100.0
    """
    a, b = down.astype(np.float64), up.astype(np.float64)
    return float(((b.T @ b) * (a @ a.T)).sum())


def orthonormal_rows(
    rows: Float[np.ndarray, "n rank d"], *, basis: bool = True
) -> tuple[Float[np.ndarray, "n rank k"], Float[np.ndarray, "n k d"]]:
    """``rows = mixing @ basis``, the basis of orthonormal rows; k is min(rank, d).

    From the Gram matrix where its condition leaves less error than the precision of the rows does,
    and from a QR decomposition, which takes several times as long, of the others: those in float64,
    and those of deficient rank or nearly so.

    Args:
        rows: Finite.
        basis: Whether the basis is wanted; otherwise, what is returned for it is not one.

    Returns:
        Mixing and basis, float64.

    Example:
        >>> mixing, basis = orthonormal_rows(np.array([[[3.0, 4.0]]], np.float32))
        >>> abs(mixing), abs(basis).round(6)
        (array([[[5.]]]), array([[[0.6, 0.8]]]))
    """
    eps = float(np.finfo(rows.dtype).eps)
    exact = rows.astype(np.float64, copy=False)
    bound = GRAM_MARGIN * float(np.finfo(np.float64).eps) / eps
    if bound >= 1 or rows.shape[1] > rows.shape[2]:
        return _by_qr(exact)
    values, vectors = np.linalg.eigh(exact @ exact.transpose(0, 2, 1))
    # A basis from a Gram matrix is orthonormal to eps times its condition.
    steady = values[:, 0] > bound * values[:, -1]
    roots = np.sqrt(np.where(steady[:, None], values, 1.0))[:, None, :]
    mixing = vectors * roots
    found = (vectors / roots).transpose(0, 2, 1) @ exact if basis else exact
    if not steady.all():
        found = found if basis else found.copy()
        mixing[~steady], found[~steady] = _by_qr(exact[~steady])
    return mixing, found


def _by_qr(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    basis, mixing = np.linalg.qr(rows.transpose(0, 2, 1))
    return mixing.transpose(0, 2, 1), basis.transpose(0, 2, 1)
