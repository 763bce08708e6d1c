"""Directions of updates as rows of one matrix: which columns are which, and kernels from them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_ws.functional.delta_gram import Directions, direction_norms, shared_grams
from lora_ws.memory import BLOCK_BYTES


class Part(NamedTuple):
    """Columns that hold the directions of one layer for one kernel.

    Attributes:
        number: among all parts.
        side: which layer, and whether the first directions are those that it reads. Parts
            of one side differ in their first directions by a factor for each adapter alone.
        columns: of the flat matrix.
        shapes: ``[rank, width]`` of the first directions, and of the second where they are others.
    """

    number: int
    side: tuple[int, bool]
    columns: slice
    shapes: tuple[tuple[int, int], ...]


def unflatten(flat: np.ndarray, part: Part) -> Directions:
    """The directions of a part, as views of the flat matrix ``[n, columns]``."""
    held, (rank, width) = flat[:, part.columns], part.shapes[0]
    first = held[:, : rank * width].reshape(-1, rank, width)
    if len(part.shapes) == 1:
        return Directions(first, first)
    return Directions(first, held[:, rank * width :].reshape(-1, *part.shapes[1]))


def first_sizes(flat: np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """Norms of the first directions of each part ``[parts, n]``, float64."""
    norms = [direction_norms(unflatten(flat, part).first) for part in parts]
    return np.array(norms, np.float64).reshape(len(parts), len(flat))


def side_grams(
    flat: np.ndarray, landmarks: np.ndarray, parts: Sequence[Part], sizes: np.ndarray
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Kernels with the landmarks of parts of one side, some rows at a time.

    The product of first directions is made once and scaled to what each part's own would be.

    Args:
        flat: directions ``[n, columns]``.
        landmarks: directions ``[m, columns]``.
        parts: of one side, at least one.
        sizes: those of the landmarks' first directions ``[parts, m]``.

    Yields:
        Rows, and a float64 kernel ``[rows, m]`` for each part.
    """
    others = [unflatten(landmarks, part) for part in parts]
    step = max(1, BLOCK_BYTES // (24 * parts[0].shapes[0][0] * len(landmarks)))
    for start in range(0, len(flat), step):
        block = slice(start, start + step)
        mine = [unflatten(flat[block], part) for part in parts]
        seconds = [
            (own.second, other.second) if len(part.shapes) == 2 else None
            for part, own, other in zip(parts, mine, others, strict=True)
        ]
        grams = shared_grams(mine[0].first, others[0].first, seconds)
        if len(parts) > 1:
            own = first_sizes(flat[block], parts)
            for k, second in enumerate(seconds):
                ratio = np.multiply.outer(_ratio(own[k], own[0]), _ratio(sizes[k], sizes[0]))
                grams[k] *= ratio**2 if second is None else ratio
        yield block, grams


def _ratio(sizes: np.ndarray, lead: np.ndarray) -> np.ndarray:
    return sizes / np.where(lead > 0, lead, 1.0)
