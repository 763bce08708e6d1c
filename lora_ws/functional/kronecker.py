"""Factors that are Kronecker products, as LoKr's: multiplied and measured without being formed.

An update ``(B1 (x) B2) (A1 (x) A2)`` has as many numbers in its factors as the matrix that it
changes, and more. What is asked of it are products of what is asked of the two small sides.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lora_ws.functional.factors import Cut, cut_to_rank


@dataclass(frozen=True, eq=False)
class KroneckerProduct:
    """A Kronecker product of two matrices, or some rows of it.

    Attributes:
        first: ``[a, b]``.
        second: ``[c, d]``.
        rows: stretches of the ``a * c`` rows, in order; none for all of them.

    Example:
        >>> product = KroneckerProduct(np.eye(2), np.array([[1.0, 2.0]]))
        >>> product.form().tolist(), (np.ones((1, 2)) @ product).tolist()
        ([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]], [[1.0, 2.0, 1.0, 2.0]])
    """

    first: Float[np.ndarray, "a b"]
    second: Float[np.ndarray, "c d"]
    rows: tuple[slice, ...] = ()

    # numpy leaves products with it to the methods below.
    __array_ufunc__ = None
    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        height = len(self.first) * len(self.second)
        if self.rows:
            height = sum(part.stop - part.start for part in self.rows)
        return height, self.first.shape[1] * self.second.shape[1]

    def astype(self, dtype: type) -> "KroneckerProduct":
        """The same in another type of numbers."""
        return KroneckerProduct(self.first.astype(dtype), self.second.astype(dtype), self.rows)

    def take(self, rows: tuple[slice, ...]) -> "KroneckerProduct":
        """Some stretches of rows of the whole product."""
        return KroneckerProduct(self.first, self.second, rows)

    def form(self) -> np.ndarray:
        """The matrix itself."""
        whole = np.kron(self.first, self.second)
        return np.concatenate([whole[part] for part in self.rows]) if self.rows else whole

    def __matmul__(self, other: Float[np.ndarray, "columns n"]) -> Float[np.ndarray, "rows n"]:
        # (F (x) S) vec(X) = vec(F X S^T), row by row.
        blocks = other.reshape(self.first.shape[1], self.second.shape[1], -1)
        inner = np.einsum("cd,bdn->bcn", self.second, blocks, optimize=True)
        whole = np.einsum("ab,bcn->acn", self.first, inner, optimize=True)
        whole = whole.reshape(-1, other.shape[1])
        return np.concatenate([whole[part] for part in self.rows]) if self.rows else whole

    def __rmatmul__(self, other: Float[np.ndarray, "n rows"]) -> Float[np.ndarray, "n columns"]:
        if self.rows:
            spread = np.zeros((len(other), len(self.first) * len(self.second)), other.dtype)
            at = 0
            for part in self.rows:
                spread[:, part] = other[:, at : (at := at + part.stop - part.start)]
            other = spread
        blocks = other.reshape(-1, len(self.first), len(self.second))
        inner = np.einsum("nac,ab->nbc", blocks, self.first, optimize=True)
        whole = np.einsum("nbc,cd->nbd", inner, self.second, optimize=True)
        return whole.reshape(len(other), -1)


def kronecker_norm(down: KroneckerProduct, up: KroneckerProduct) -> float:
    """Frobenius norm of ``up @ down``.

    Args:
        down: A, of all rows.
        up: B.

    Example:
        >>> one, two = np.array([[3.0, 4.0]]), np.array([[2.0]])
        >>> eye = KroneckerProduct(np.eye(1), np.eye(1))
        >>> kronecker_norm(KroneckerProduct(one, two), eye)
        10.0
    """
    sides = ((down.first, up.first), (down.second, up.second))
    squares = [row_squares(a.astype(np.float64), b.astype(np.float64)) for a, b in sides]
    if not up.rows:
        return float(np.sqrt(squares[0].sum()) * np.sqrt(squares[1].sum()))
    rows = np.multiply.outer(*squares).ravel()
    return float(np.sqrt(sum(rows[part].sum() for part in up.rows)))


def row_squares(
    down: Float[np.ndarray, "rank inputs"], up: Float[np.ndarray, "outputs rank"]
) -> Float[np.ndarray, " outputs"]:
    """Sums of squares of the rows of ``up @ down``.

    Example:
        >>> row_squares(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]])).tolist()
        [100.0, 0.0]
    """
    return np.square(up @ down).sum(axis=1)


def cut_kronecker(down: KroneckerProduct, up: KroneckerProduct, rank: int) -> Cut:
    """The best product of a rank, as `cut_to_rank`: singular values are products of the sides'.

    Args:
        down: A, of all rows.
        up: B, of all rows.
        rank: of the result.
    """
    sides = ((down.first, up.first), (down.second, up.second))
    cuts = [cut_to_rank(a, b, min(len(a), len(b), a.shape[1])) for a, b in sides]
    values = np.multiply.outer(*(np.square(cut.down).sum(axis=1) for cut in cuts))
    best = np.argsort(-values, axis=None, kind="stable")[:rank]
    chosen = np.unravel_index(best, values.shape)
    rows, columns = (
        np.zeros((rank, a.shape[1] * b.shape[1]))
        for a, b in ((cuts[0].down, cuts[1].down), (cuts[0].up.T, cuts[1].up.T))
    )
    rows[: len(best)] = row_products(*(cut.down[k] for cut, k in zip(cuts, chosen, strict=True)))
    columns[: len(best)] = row_products(*(cut.up.T[k] for cut, k in zip(cuts, chosen, strict=True)))
    kept, whole = np.square(values.ravel()[best]).sum(), cuts[0].whole * cuts[1].whole
    return Cut(rows, columns.T, float(kept), whole)


def row_products(
    first: Float[np.ndarray, "n b"], second: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "n bd"]:
    """Kronecker products of the rows of two matrices, row by row.

    Example:
        >>> row_products(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])).tolist()
        [[3.0, 4.0, 6.0, 8.0]]
    """
    return np.einsum("nb,nd->nbd", first, second).reshape(len(first), -1)
