"""Some rows of a matrix that is too large to copy."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows and columns of a matrix, copied block by block when they are asked for.

    It is indexed by rows, as an array is; whoever takes it asks for blocks and holds no more.

    Attributes:
        matrix: ``[rows, columns]``, often a memory map.
        index: which rows, in which order.
        columns: which columns; all by default.

    Example:
        >>> some = Rows(np.arange(8.0).reshape(4, 2), np.array([3, 0]))
        >>> some.shape, some[:1].tolist(), some.of(slice(1, 2))[:].ravel().tolist()
        ((2, 2), [[6.0, 7.0]], [7.0, 1.0])
    """

    matrix: Float[np.ndarray, "all params"]
    index: Int[np.ndarray, " chosen"]
    columns: Any = field(default_factory=lambda: slice(None))

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers."""
        return self.matrix.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.matrix.itemsize

    @property
    def ndim(self) -> int:
        """Two: rows and columns."""
        return 2

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.index), self.matrix[:0, self.columns].shape[1]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: Any) -> Float[np.ndarray, "block columns"]:
        """A copy of some of the rows."""
        index = self.index[part]
        if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            return np.array(self.matrix[index[0] : index[0] + len(index), self.columns])
        if isinstance(self.columns, slice):
            return self.matrix[index, self.columns]
        return self.matrix[index][:, self.columns]

    def of(self, columns: Any) -> "Rows":
        """The same rows of some of all columns."""
        return replace(self, columns=columns)
