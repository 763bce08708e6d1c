"""Some rows of a matrix that is too large to copy."""

import mmap
from collections.abc import Iterator
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
        held = np.empty((len(self.index[part]), self.shape[1]), self.dtype)
        self.into(held, part)
        return held

    def into(self, held: Float[np.ndarray, "block columns"], part: Any) -> None:
        """Copy some of the rows into memory that is there."""
        # Rows of the base class, as each row of a memory map is wrapped anew.
        matrix, index = np.asarray(self.matrix), self.index[part]
        _announce(matrix[:, self.columns] if isinstance(self.columns, slice) else matrix, index)
        if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            held[:] = matrix[index[0] : index[0] + len(index), self.columns]
            return
        for k, row in enumerate(index):
            held[k] = matrix[row, self.columns]

    def of(self, columns: Any) -> "Rows":
        """The same rows of some of all columns."""
        return replace(self, columns=columns)


# Reading on costs less than a request of its own.
_GAP_BYTES = 64 << 10


def _announce(matrix: np.ndarray, index: np.ndarray) -> None:
    """Have the system read these rows of a file that is mapped, and no others.

    Otherwise it reads each when it is touched, and megabytes after it that nobody asked for.
    """
    mapped: Any = matrix
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if not len(index) or not isinstance(mapped, mmap.mmap) or not hasattr(mapped, "madvise"):
        return  # rows in memory, or Windows
    start = matrix.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    starts = np.sort(start + matrix.strides[0] * index.astype(np.int64))
    starts -= starts % mmap.PAGESIZE
    stops = starts + matrix.shape[1] * abs(matrix.strides[1]) + mmap.PAGESIZE
    apart = np.flatnonzero(starts[1:] > stops[:-1] + _GAP_BYTES) + 1
    first, last = np.r_[0, apart], np.r_[apart, len(starts)] - 1
    for begin, end in zip(starts[first].tolist(), stops[last].tolist(), strict=True):
        mapped.madvise(mmap.MADV_WILLNEED, begin, min(end, len(mapped)) - begin)


def row_blocks(
    x: Float[np.ndarray, "rows columns"] | Rows, step: int
) -> Iterator[tuple[slice, Float[np.ndarray, "block columns"]]]:
    """Consecutive blocks of rows, as copies to work on: each is overwritten by the next.

    To get memory for each block from the system would cost as much as to read the block.

    Args:
        x: a matrix, or rows of one.
        step: how many rows to a block.

    Example:
        >>> for part, block in row_blocks(np.arange(6.0).reshape(3, 2), 2):
        ...     print(part.start, part.stop, block.tolist())
        0 2 [[0.0, 1.0], [2.0, 3.0]]
        2 3 [[4.0, 5.0]]
    """
    rows = x if isinstance(x, Rows) else Rows(x, np.arange(len(x)))
    held = np.empty((min(step, len(x)), x.shape[1]), x.dtype)
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        block = held[: part.stop - part.start]
        rows.into(block, part)
        yield part, block
