"""Exact statistics of every entry of a low-rank update ``up @ down``."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import as_strided

from lora_ws.errors import ConfigError
from lora_ws.functional.moments import (
    STATISTICS,
    check_statistics,
    power_of_two_scale,
    product_moments,
    shape_statistics,
    summary_statistics,
    unscale,
)

_MOMENTS = ("mean", "std", "kurtosis", "skew")
_LARGEST = np.finfo(np.float64).max
# From this rank on the power sums of the product cost less than those of the factors.
_PRODUCT_RANK = 16
# Values of both vectors, and candidate products, handled at once.
_BLOCK_VALUES = 1 << 19
_CANDIDATES_AT_ONCE = 1 << 17
# Below this index the hyperbola of pairs is gathered; above it the median is bracketed.
_HYPERBOLA_UP_TO = 4096
_SMALLEST_BUCKET = 64
_WIDTHS = 64
# Bracketing stops when so few products remain.
_BRACKET_LEAVES = 1 << 15


def outer_statistics(
    down: Float[np.ndarray, "rows rank in_features"],
    up: Float[np.ndarray, "rows out_features rank"],
    statistics: Sequence[str] = STATISTICS,
) -> Float[np.ndarray, "rows statistics"]:
    """Statistics of all entries of ``up @ down`` for every row.

    Definitions are those of ``summary_statistics``. The moments follow from sums over the factors
    and need no product. At rank 1 neither do the others: the extremes are among four products, and
    the median is found among the few pairs that can hold it, exactly (the products of two float32
    numbers are exact in float64). At higher rank the product of one row at a time is formed in the
    dtype of the input, and only if median, min or max are asked for, the rank is 16 or more, or the
    factors cancel so far that only the product can tell its spread.

    Args:
        down: Finite factors A ``[rows, rank, in_features]``, float32 or float64.
        up: Finite factors B ``[rows, out_features, rank]``, of the same dtype.
        statistics: Names from ``STATISTICS``.

    Returns:
        A float64 array ``[rows, len(statistics)]``.

    Raises:
        ConfigError: If the shapes or dtypes do not match, or a statistic is unknown.

    Example:
        >>> down, up = np.array([[[1.0, 2.0, 3.0]]]), np.array([[[1.0], [-1.0]]])
        >>> outer_statistics(down, up, ("mean", "median", "min", "max"))
        array([[ 0., -1., -3.,  3.]])
    """
    check_statistics(statistics)
    down, up = np.asarray(down), np.asarray(up)
    _check_factors(down, up)
    if down.shape[1] > 1:
        found = [_low_rank(a, b, statistics) for a, b in zip(down, up, strict=True)]
        return np.array(found).reshape(len(down), len(statistics))
    result = np.empty((len(down), len(statistics)))
    step = max(1, _BLOCK_VALUES // (down.shape[2] + up.shape[1]))
    for start in range(0, len(down), step):
        rows = slice(start, start + step)
        columns = _rank_one(down[rows, 0, :], up[rows, :, 0], statistics)
        for column, name in enumerate(statistics):
            result[rows, column] = columns[name]
    return result


def _check_factors(down: np.ndarray, up: np.ndarray) -> None:
    fits = down.ndim == up.ndim == 3 and (len(down), down.shape[1]) == (len(up), up.shape[2])
    if not fits or 0 in down.shape[1:] + up.shape[1:]:
        raise ConfigError(
            "expected down [rows, rank, in_features] and up [rows, out_features, rank] with equal "
            f"rows and rank and nothing empty, got {down.shape} and {up.shape}; "
            "check the order of the factors and that neither is transposed"
        )
    if down.dtype != up.dtype or down.dtype not in (np.float32, np.float64):
        raise ConfigError(
            f"expected factors both float32 or both float64, got {down.dtype} and {up.dtype}; "
            "convert them with astype(np.float32)"
        )


def _rank_one(down: np.ndarray, up: np.ndarray, statistics: Sequence[str]) -> dict[str, np.ndarray]:
    # Sorted in their own dtype, which is several times faster than in float64.
    a, b = (np.sort(vector, axis=1).astype(np.float64) for vector in (down, up))
    with np.errstate(over="ignore"):
        corners = np.stack([a[:, i] * b[:, j] for i, j in product((0, -1), repeat=2)])
        low, high = (np.clip(end, -_LARGEST, _LARGEST) for end in (corners.min(0), corners.max(0)))
        found = product_moments(a, b, higher=not {"kurtosis", "skew"}.isdisjoint(statistics))
        if "median" in statistics:
            found["median"] = np.clip(_medians(a, b), -_LARGEST, _LARGEST)
    found["mean"] = np.clip(found["mean"], low, high)
    for name in {"std", "kurtosis", "skew"} & set(found):
        found[name] = np.where(low == high, 0.0, found[name])
    return found | {"min": low, "max": high}


def _medians(
    a: np.ndarray,
    b: np.ndarray,
    hyperbola_up_to: int = _HYPERBOLA_UP_TO,
    bracket_leaves: int = _BRACKET_LEAVES,
) -> np.ndarray:
    """Lower median of all products a_i b_j of sorted float64 rows, exactly.

    Counting signs says whether the median is negative, zero or positive and how many products of
    its sign lie between zero and it (its depth). Only the smallest products matter then.
    """
    one, other = _Outwards.of(a), _Outwards.of(b)
    (a_positive, a_negative), (b_positive, b_negative) = one.counts, other.counts
    negative = a_positive * b_negative + a_negative * b_positive
    positive = a_positive * b_positive + a_negative * b_negative
    total = a.shape[1] * b.shape[1]
    middle = (total - 1) // 2
    sign = np.where(middle < negative, -1, np.where(middle >= total - positive, 1, 0))
    depth = np.where(sign < 0, negative - 1 - middle, middle - (total - positive))
    # A negative product pairs opposite signs.
    other = other.mirrored(sign < 0)
    magnitude = np.zeros(len(a))
    shallow = (sign != 0) & (depth < hyperbola_up_to)
    for rows, bucket in _buckets(shallow, depth, (a.shape[1], b.shape[1])):
        pairs = [(one.take(rows, k, bucket), other.take(rows, k, bucket)) for k in (0, 1)]
        magnitude[rows] = _hyperbola(pairs, depth[rows], bucket)
    for row in np.flatnonzero((sign != 0) & ~shallow):
        straight = b[row] if sign[row] > 0 else -b[row, ::-1]
        magnitude[row] = _bracketed(_rectangles(a[row], straight), int(depth[row]), bracket_leaves)
    return sign * magnitude


class _Outwards(NamedTuple):
    """Magnitudes of sorted rows from zero outwards, on either side of it.

    Attributes:
        values: all rows, all rows mirrored, and room behind them.
        begins: where in ``values`` the positive and the negative ones of each row begin
            ``[2, rows]``.
        counts: how many these are ``[2, rows]``.
    """

    values: np.ndarray
    begins: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, ordered: np.ndarray) -> "_Outwards":
        rows, width = ordered.shape
        values = np.empty(2 * rows * width + width + _WIDTHS)
        values[2 * rows * width :] = np.inf
        sides = values[: 2 * rows * width].reshape(2, rows, width)
        sides[0] = ordered
        np.negative(ordered[:, ::-1], out=sides[1])
        # The first that is beyond zero is found faster than all are counted; 0 where none is, too.
        counts = np.where(sides[..., -1] > 0, width - (sides > 0).argmax(axis=2), 0)
        begins = width * np.arange(1, 2 * rows + 1).reshape(2, rows) - counts
        return cls(values, begins, counts)

    def mirrored(self, rows: np.ndarray) -> "_Outwards":
        """With the sides of some rows exchanged ``[rows]``."""
        begins, counts = (np.where(rows, both[::-1], both) for both in self[1:])
        return self._replace(begins=begins, counts=counts)

    def take(self, rows: np.ndarray, side: int, most: int) -> np.ndarray:
        """Those next to zero of some rows, at most so many, inf behind the last."""
        there = self.counts[side, rows]
        # Rounded up, so that few lists of pairs are made.
        width = min(most, -(-max(int(there.max()), 1) // _WIDTHS) * _WIDTHS)
        windows = as_strided(
            self.values, (len(self.values) - width + 1, width), 2 * self.values.strides
        )
        found = windows[self.begins[side, rows]]
        if there.min() < width:
            found[np.arange(width) >= there[:, None]] = np.inf
        return found


def _buckets(
    shallow: np.ndarray, depth: np.ndarray, sizes: tuple[int, int]
) -> list[tuple[np.ndarray, int]]:
    """Rows grouped by the power of two above their depth, few enough to share one gather."""
    buckets = np.maximum(2 ** np.frexp(depth.astype(np.float64))[1], _SMALLEST_BUCKET)
    groups = []
    for bucket in np.unique(buckets[shallow]).tolist():
        rows = np.flatnonzero(shallow & (buckets == bucket))
        # Rounded up to an eighth: tight enough, and few enough lists of pairs to keep.
        bucket = -(-(int(depth[rows].max()) + 1) * 8 // bucket) * bucket // 8
        step = max(1, _CANDIDATES_AT_ONCE // (2 * len(_hyperbola_pairs(bucket, *sizes)[0])))
        groups += [(rows[start : start + step], bucket) for start in range(0, len(rows), step)]
    return groups


@lru_cache(maxsize=64)
def _hyperbola_pairs(bucket: int, most: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with (i + 1)(j + 1) <= bucket, i < most and j < other.

    Among sorted positive numbers the product (i, j) has (i + 1)(j + 1) - 1 others not above it, so
    no other pair can hold a product of depth below ``bucket``.
    """
    widths = np.minimum(bucket // np.arange(1, min(bucket, most) + 1), other)
    first = np.repeat(np.arange(len(widths)), widths)
    second = np.arange(len(first)) - np.repeat(np.cumsum(widths) - widths, widths)
    return first, second


def _hyperbola(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], depth: np.ndarray, bucket: int
) -> np.ndarray:
    """The product of the given depth (< bucket) among those of both pairs, for every row."""
    lists = [_hyperbola_pairs(bucket, one.shape[1], other.shape[1]) for one, other in pairs]
    candidates = np.empty((len(depth), bucket + sum(len(first) for first, _ in lists)))
    # Zeros bring every row's product to the same place, so that one selection serves all rows.
    padded = np.arange(bucket) < bucket - 1 - depth[:, None]
    candidates[:, :bucket] = np.where(padded, 0.0, np.inf)
    end = bucket
    for (one, other), (first, second) in zip(pairs, lists, strict=True):
        begin, end = end, end + len(first)
        products = candidates[:, begin:end]
        np.multiply(one.take(first, axis=1), other.take(second, axis=1), out=products)
    candidates.partition(bucket - 1, axis=1)
    return candidates[:, bucket - 1]


def _rectangles(a: np.ndarray, b: np.ndarray) -> list[list[np.ndarray]]:
    """The sorted magnitudes whose products are the positive products, shorter side first."""
    pairs = ((a[a > 0], b[b > 0]), (-a[a < 0][::-1], -b[b < 0][::-1]))
    return [sorted(pair, key=len) for pair in pairs if min(map(len, pair)) > 0]


def _bracketed(rectangles: list[list[np.ndarray]], depth: int, leaves: int) -> float:
    """The product of the given depth, by narrowing a bracket that counting says must hold it."""
    low, high, below, upto = _bracket(rectangles, depth, leaves)
    candidates = []
    for (short, long), begin, end in zip(rectangles, below, upto, strict=True):
        widths = end - begin
        first = np.repeat(np.arange(len(short)), widths)
        offsets = np.repeat(begin - (np.cumsum(widths) - widths), widths)
        candidates.append(short[first] * long[np.arange(len(first)) + offsets])
    rank = depth - sum(int(counts.sum()) for counts in below)
    value = np.partition(np.concatenate(candidates), rank)[rank]
    # Counting divides and so errs by a rounding or two: a result clear of both ends is certain.
    if max(low * (1 + 1e-14), 1e-280) <= value <= high * (1 - 1e-14):
        return float(value)
    everything = np.concatenate([np.outer(short, long).ravel() for short, long in rectangles])
    return float(np.partition(everything, depth)[depth])


def _bracket(
    rectangles: list[list[np.ndarray]], depth: int, leaves: int
) -> tuple[float, float, list[np.ndarray], list[np.ndarray]]:
    """Bounds of the product of the given depth, and per short value how many products are below."""
    low, high = 0.0, min(max(short[-1] * long[-1] for short, long in rectangles) * 1.01, _LARGEST)
    floor = max(min(short[0] * long[0] for short, long in rectangles) * 0.99, 1e-300)
    below = [np.zeros(len(short), np.int64) for short, _ in rectangles]
    upto = [np.full(len(short), len(long)) for short, long in rectangles]
    n_below, n_upto = 0, sum(len(short) * len(long) for short, long in rectangles)
    for step in range(200):
        if n_upto - n_below <= leaves or high <= low * (1 + 1e-13):
            break
        share = (depth + 0.5 - n_below) / (n_upto - n_below)
        # The count is nearly linear close to zero; every third step guards against heavy tails.
        guess = low + (high - low) * min(max(share, 1e-3), 1 - 1e-3)
        if step % 3 == 0:
            guess = float(np.sqrt(max(low, floor)) * np.sqrt(high))
        counts = [np.searchsorted(long, guess / short, side="right") for short, long in rectangles]
        n_counts = sum(int(count.sum()) for count in counts)
        if n_counts <= depth:
            low, below, n_below = guess, counts, n_counts
        else:
            high, upto, n_upto = guess, counts, n_counts
    return low, high, below, upto


def _low_rank(down: np.ndarray, up: np.ndarray, statistics: Sequence[str]) -> list[float]:
    """The statistics of one product, in the order asked for."""
    found = {}
    if len(down) < _PRODUCT_RANK and not set(_MOMENTS).isdisjoint(statistics):
        found = _factor_moments(down, up)
    if rest := [name for name in statistics if name not in found]:
        found |= _product_statistics(down, up, rest)
    return [found[name] for name in statistics]


def _product_statistics(
    down: np.ndarray, up: np.ndarray, statistics: Sequence[str]
) -> dict[str, float]:
    largest, scales = [float(np.abs(factor).max()) for factor in (down, up)], [np.ones(1)] * 2
    # Python floats overflow to inf without a warning, which is the answer wanted here.
    if largest[0] * largest[1] * len(down) * 2 > float(np.finfo(down.dtype).max):
        scales = [power_of_two_scale(np.array([value])) for value in largest]
        down, up = down * scales[0], up * scales[1]
    values = summary_statistics((up @ down).reshape(1, -1), statistics)[0]
    found = dict(zip(statistics, values.tolist(), strict=True))
    for name in set(found) - {"kurtosis", "skew"}:
        found[name] = float(unscale(np.array([found[name]]), *scales)[0])
    return found


def _factor_moments(down: np.ndarray, up: np.ndarray) -> dict[str, float]:
    """Moments of one product from Gram matrices of its factors; empty if they cannot be trusted.

    An entry minus the mean is the inner product of [β·A, 1, β] and [1, B·α, α], where A and B are
    the mean columns and rows and α, β the centred ones. Its p-th power is that of the p-fold tensor
    products, whose sums over in and out features separate.
    """
    scales = [power_of_two_scale(np.abs(factor).max(keepdims=True)[0]) for factor in (down, up)]
    a, b = down.T * scales[0], up * scales[1]
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a, b = a - mean_a, b - mean_b
    count = len(a) * len(b)
    left = np.column_stack([b @ mean_a, np.ones(len(b)), b])
    right = np.column_stack([np.ones(len(a)), a @ mean_b, a])
    terms = (left.T @ left) * (right.T @ right) / count
    second = terms.sum()
    level = np.finfo(down.dtype).eps * float(np.abs(mean_a) @ np.abs(mean_b))
    with np.errstate(over="ignore"):
        smallest = np.finfo(down.dtype).tiny.astype(np.float64) * scales[0] * scales[1]
    # Where terms cancel, or the spread is near the rounding of the product, let the product decide.
    if second <= max(1e-4 * np.abs(terms).sum(), (64 * level) ** 2) or second <= smallest:
        return {}
    left_pairs, right_pairs = _pair_products(left), _pair_products(right)
    third = ((left_pairs.T @ left) * (right_pairs.T @ right)).sum() / count
    fourth = ((left_pairs.T @ left_pairs) * (right_pairs.T @ right_pairs)).sum() / count
    found = shape_statistics(*(np.array([m]) for m in (second, third, fourth)), count=count)
    found["mean"] = np.array([mean_a @ mean_b])
    found |= {name: unscale(found[name], *scales) for name in ("mean", "std")}
    return {name: float(value[0]) for name, value in found.items()}


def _pair_products(columns: np.ndarray) -> np.ndarray:
    """Products of all pairs of columns, each pair once, weighted so that Grams count it twice."""
    i, j = np.triu_indices(columns.shape[1])
    return columns[:, i] * columns[:, j] * np.where(i == j, 1.0, np.sqrt(2.0))
