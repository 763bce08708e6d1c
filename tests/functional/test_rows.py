"""Blocks of some rows of a matrix, and what the system is asked to read for them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_ws.functional.rows import Rows, row_blocks

IO = Path("/proc/self/io")


@pytest.mark.parametrize("index", [np.arange(3, 9), np.array([7, 0, 7, 2, 5, 5])])
@pytest.mark.parametrize("columns", [slice(None), slice(2, 5), np.array([4, 1])], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_are_copies_of_the_rows(index: np.ndarray, columns: Any, order: Any) -> None:
    matrix = np.asarray(np.random.default_rng(0).standard_normal((10, 6)), order=order)
    whole, got = matrix[index][:, columns], []
    for part, block in row_blocks(Rows(matrix, index, columns), 4):
        np.testing.assert_array_equal(block, whole[part])
        got.append(block.copy())
        block[:] = 0
    np.testing.assert_array_equal(np.concatenate(got), whole)
    np.testing.assert_array_equal(matrix[index][:, columns], whole)


def test_rows_of_parts_of_a_map_are_those_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers, index = rng.standard_normal((64, 5000)).astype(np.float32), rng.permutation(20)
    np.save(tmp_path / "rows.npy", numbers)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    np.testing.assert_array_equal(Rows(mapped[5:], index)[:], numbers[5:][index])
    np.testing.assert_array_equal(Rows(mapped[::3, 7:], index)[:], numbers[::3, 7:][index])
    np.testing.assert_array_equal(Rows(mapped[::-1], index)[:], numbers[::-1][index])
    np.testing.assert_array_equal(Rows(mapped.T, index)[:], numbers.T[index])
    assert Rows(mapped, index[:0])[:].shape == (0, 5000)


@pytest.mark.skipif(not IO.is_file(), reason="no count of what a process has read")
@pytest.mark.parametrize("columns", [slice(None), slice(1 << 14, 1 << 15)], ids=str)
def test_scattered_rows_are_read_without_what_is_between_them(
    columns: slice, tmp_path: Path
) -> None:
    def read() -> int:
        return int(IO.read_text(encoding="utf-8").split("read_bytes:")[1].split()[0])

    rows, width = 64, 1 << 16  # 256 KiB each
    file = tmp_path / "rows.npy"
    np.save(file, np.ones((rows, width), np.float32))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # Not the first, beside the header: who reads that has the system read on.
    index = np.arange(4, rows, 8)[::-1]
    mapped, before = np.load(file, mmap_mode="r"), read()
    numbers = len(index) * len(range(width)[columns])
    assert Rows(mapped, index, columns)[:].sum() == numbers
    if not (taken := read() - before):
        pytest.skip("the file is in memory")
    # An eighth of the rows, and a page or two at the ends of each.
    assert taken < 2 * 4 * numbers
