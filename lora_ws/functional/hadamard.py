"""Elementwise products of two low-rank products, as LoHa's: measured without being formed.

An update ``(B1 A1) * (B2 A2)``, element by element, is a product of two factors with a component
for each pair of components of the two: of rank 64 each, 4096 rows of A and columns of B.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# Numbers of an update that are formed at once, 2 MiB.
BLOCK = 1 << 18


@dataclass(frozen=True, eq=False)
class PairProducts:
    """A factor of such an update: products of each row of one matrix with each of another.

    Attributes:
        first: ``[r, n]``.
        second: ``[s, n]``.
        columns: whether the products stand as columns, as in B, ``[n, r s]``; else as rows, as in
            A, ``[r s, n]``.

    Example:
        >>> down = PairProducts(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]]))
        >>> down.form().tolist(), (down @ np.ones((2, 1))).tolist()
        ([[3.0, 8.0], [5.0, 12.0]], [[11.0], [17.0]])
    """

    first: Float[np.ndarray, "r n"]
    second: Float[np.ndarray, "s n"]
    columns: bool = False

    # numpy leaves products with it to the methods below.
    __array_ufunc__ = None
    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        pairs, width = len(self.first) * len(self.second), self.first.shape[1]
        return (width, pairs) if self.columns else (pairs, width)

    def astype(self, dtype: type) -> "PairProducts":
        """The same in another type of numbers."""
        return PairProducts(self.first.astype(dtype), self.second.astype(dtype), self.columns)

    def take(self, rows: tuple[slice, ...]) -> "PairProducts":
        """Some stretches of rows of B."""
        one, other = (
            np.concatenate([side[:, part] for part in rows], axis=1)
            for side in (self.first, self.second)
        )
        return PairProducts(one, other, self.columns)

    def form(self) -> np.ndarray:
        """The matrix itself."""
        rows = (self.first[:, None] * self.second).reshape(-1, self.first.shape[1])
        return rows.T if self.columns else rows

    def __matmul__(self, other: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "pairs k"]:
        return NotImplemented if self.columns else self._sums(other.T).T

    def __rmatmul__(self, other: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k pairs"]:
        return self._sums(other) if self.columns else NotImplemented

    def _sums(self, weights: np.ndarray) -> np.ndarray:
        """Sums over n of the products of pairs, weighted by each row."""
        sums = [(self.first * row) @ self.second.T for row in weights]
        return np.stack(sums).reshape(len(weights), -1)


def hadamard_norm(down: PairProducts, up: PairProducts) -> float:
    """Frobenius norm of ``up @ down``, from some rows of the update after the others.

    Args:
        down: A.
        up: B.

    Example:
        >>> one, two = np.array([[3.0, 4.0]]), np.array([[1.0, 2.0]])
        >>> eye = PairProducts(np.eye(1), np.eye(1), columns=True)
        >>> hadamard_norm(PairProducts(one, two), eye) ** 2
        73.0
    """
    sides = [side.astype(np.float64) for side in (down.first, up.first, down.second, up.second)]
    sizes = [float(np.abs(side).max(initial=0.0)) for side in sides]
    if not all(sizes):
        return 0.0
    # To size one first, so that no product over- or underflows.
    a, b, c, d = (side / size for side, size in zip(sides, sizes, strict=True))
    step, total = max(1, BLOCK // a.shape[1]), 0.0
    for start in range(0, b.shape[1], step):
        rows = slice(start, start + step)
        block = (b[:, rows].T @ a) * (d[:, rows].T @ c)
        total += float(np.vdot(block, block))
    return float(np.prod(sizes) * np.sqrt(total))
