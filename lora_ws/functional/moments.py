"""Summary statistics of every row of a matrix, and moments of products of rows."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import factorial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lora_ws.errors import ConfigError

STATISTICS: tuple[str, ...] = ("mean", "std", "median", "min", "max", "kurtosis", "skew")

_LARGEST = np.finfo(np.float64).max
_ORDER = frozenset({"median", "min", "max"})
# Values handled at once: few enough for the float64 copies to stay in cache,
# enough to make the cost of a numpy call vanish.
_BLOCK_VALUES = 1 << 17
# Rows up to this length are sorted: cheaper than selecting, and the extremes come for free.
_SORT_UP_TO = 256
# A mean whose square, so many times, is above the mean square is far from 0: powers are taken of
# what differs from it, as differences of powers would lose digits.
FAR = 16


def summary_statistics(
    x: Float[np.ndarray, "rows values"],
    statistics: Sequence[str] = STATISTICS,
    overwrite_input: bool = False,
) -> Float[np.ndarray, "rows statistics"]:
    """Statistics of every row, in the order asked for.

    The standard deviation s divides by n - 1, the median is the lower of the two middle values
    (as ``torch.median``), kurtosis is m4 / s^4 - 3 and skew m3 / s^3, with m_k the biased central
    moments; both are 0 where all values are equal. Sums run in float64 whatever the input, and no
    finite input makes a NaN or an infinity (a float64 standard deviation too large for float64 is
    returned as the largest float64).

    Args:
        x: Finite float32 or float64 values ``[rows, values]``; slices and memory maps are fine.
        statistics: Names from ``STATISTICS``.
        overwrite_input: whether values may change places within a row of ``x``, which spares a
            copy (as for ``numpy.median``).

    Returns:
        A float64 array ``[rows, len(statistics)]``.

    Raises:
        ConfigError: If ``x`` is not a matrix of float32 or float64 with at least one value per row,
            or a statistic is unknown.

    Example:
        >>> x = np.array([[1.0, 2.0, 4.0, 9.0], [3.0, 3.0, 3.0, 3.0]])
        >>> summary_statistics(x, ("mean", "median", "max", "skew")).round(3)
        array([[4.   , 2.   , 9.   , 0.499],
               [3.   , 3.   , 3.   , 0.   ]])
    """
    check_statistics(statistics)
    x = np.asarray(x)
    if x.ndim != 2 or x.shape[1] == 0 or x.dtype not in (np.float32, np.float64):
        raise ConfigError(
            "expected a float32 or float64 matrix [rows, values] with at least one value per row, "
            f"got {x.dtype} of shape {x.shape}; reshape it or convert it with astype(np.float32)"
        )
    sums = _Sums.zeros(len(x), x.dtype)
    spread = not {"std", "kurtosis", "skew"}.isdisjoint(statistics)
    higher = not {"kurtosis", "skew"}.isdisjoint(statistics)
    step = max(1, min(len(x), _BLOCK_VALUES // x.shape[1]))
    # Copies of one block after the other go to the same memory: the system need not clear it anew.
    wide = np.empty((2, step, min(x.shape[1], _BLOCK_VALUES)))
    room = None if overwrite_input else np.empty((step, x.shape[1]), x.dtype)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        block, some = x[rows], sums.of(rows)
        block.min(axis=1, out=some.low)
        block.max(axis=1, out=some.high)
        if not _ORDER.issuperset(statistics):
            _add_moments(some, block, wide, spread, higher)
        # Last, as values change places.
        if "median" in statistics:
            some.median[:] = _lower_median(block, room)
    found = {"min": sums.low, "median": sums.median, "max": sums.high}
    if not _ORDER.issuperset(statistics):
        found |= _moment_statistics(sums, x.shape[1], spread, higher)
    result = np.empty((len(x), len(statistics)))
    for column, name in enumerate(statistics):
        result[:, column] = found[name]
    return result


def check_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """Refuse names that are not in ``STATISTICS``.

    Args:
        statistics: The names to check.

    Returns:
        The names.

    Raises:
        ConfigError: If a name is unknown.

    Example:
        >>> check_statistics(["mean", "skew"])
        ('mean', 'skew')
    """
    unknown = [name for name in statistics if name not in STATISTICS]
    if unknown or isinstance(statistics, str):
        raise ConfigError(
            f"statistics: expected a sequence of names from {', '.join(STATISTICS)}, got "
            f"{statistics!r}; correct the spelling or leave the name out"
        )
    return tuple(statistics)


def shape_statistics(
    *moments: Float[np.ndarray, " rows"], count: int
) -> dict[str, Float[np.ndarray, " rows"]]:
    """Standard deviation, kurtosis and skew from biased central moments.

    Args:
        *moments: Second, third and fourth central moments ``[rows]``, or the second alone.
        count: How many values the moments are over.

    Returns:
        The statistics by name, of the second moment alone the standard deviation; kurtosis and
        skew are 0 where the second moment is.

    Example:
        >>> found = shape_statistics(np.ones(1), np.zeros(1), np.ones(1), count=2)
        >>> found["std"].round(3), found["kurtosis"].round(3)
        (array([1.414]), array([-2.75]))
    """
    std = np.sqrt(moments[0] * (count / max(count - 1, 1)))
    if len(moments) == 1:
        return {"std": std}
    spread = std > 0
    divisor = np.where(spread, std, 1.0)
    return {
        "std": std,
        "kurtosis": np.where(spread, moments[2] / divisor**4 - 3.0, 0.0),
        "skew": np.where(spread, moments[1] / divisor**3, 0.0),
    }


def power_of_two_scale(largest: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Power of two that brings magnitudes near 1; multiplying by it rounds nothing away.

    Args:
        largest: Largest magnitude of every row ``[rows]``.

    Returns:
        The float64 factors ``[rows]``.

    Example:
        >>> power_of_two_scale(np.array([0.0, 3.0, 1e300])) * np.array([0.0, 3.0, 1e300])
        array([0.        , 0.75      , 0.74661089])
    """
    # The bound keeps 2**1074, the factor for the smallest subnormal, from overflowing.
    return np.ldexp(1.0, -np.maximum(np.frexp(np.asarray(largest, np.float64))[1], -1000))


def unscale(
    values: Float[np.ndarray, " rows"], *scales: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Undo power-of-two scales, stopping at the largest float64 instead of infinity.

    Args:
        values: Scaled values ``[rows]``.
        *scales: The factors they were multiplied with ``[rows]``.

    Returns:
        Float64 values ``[rows]``.

    Example:
        >>> unscale(np.array([0.75, -1.5]), np.array([0.25, 2.0**-1023]))
        array([ 3.00000000e+000, -1.34826985e+308])
    """
    with np.errstate(over="ignore"):
        for scale in sorted(scales, key=lambda one: one.max(initial=0), reverse=True):
            values = values / scale
    return np.clip(values, -_LARGEST, _LARGEST)


def product_moments(
    a: Float[np.ndarray, "rows left"], b: Float[np.ndarray, "rows right"], higher: bool = True
) -> dict[str, Float[np.ndarray, " rows"]]:
    """Mean, std, kurtosis and skew of all products a_i b_j of every row, without forming them.

    With a = A + α and b = B + β, A and B the means, a product minus its mean is Aβ + Bα + αβ. In
    its powers, expanded, only those terms survive in which neither α nor β stands to the power of
    exactly one, and each is a product of moments of a and of b.

    Args:
        a: Finite float64 values ``[rows, left]``, each row ascending.
        b: Finite float64 values ``[rows, right]``, each row ascending.
        higher: Whether kurtosis and skew are wanted.

    Returns:
        The statistics by name ``[rows]``, as ``summary_statistics`` defines them.

    Example:
        >>> product_moments(np.array([[1.0, 3.0]]), np.array([[2.0, 2.0]]))["mean"]
        array([4.])
    """
    mean_a, about_a, scale_a = _vector_moments(a, higher)
    mean_b, about_b, scale_b = _vector_moments(b, higher)
    central = [np.zeros(len(a)) for _ in range(5 if higher else 3)]
    for power, factor, p, q, r in _expansion():
        if power < len(central):
            central[power] += factor * mean_a**p * mean_b**q * about_b[p + r] * about_a[q + r]
    found = shape_statistics(*central[2:], count=a.shape[1] * b.shape[1])
    found["mean"] = unscale(mean_a * mean_b, scale_a, scale_b)
    found["std"] = unscale(found["std"], scale_a, scale_b)
    return found


class _Sums(NamedTuple):
    """What one pass over rows leaves, of every row: all statistics follow without the rows.

    Attributes:
        low: smallest value.
        median: the lower of the two middle values.
        high: largest value.
        scale: power of two that values were multiplied with before anything else.
        raw: means of first to fourth powers.
        central: second to fourth central moments, of rows whose mean is far from 0.
        far: which these are.
    """

    low: Float[np.ndarray, " rows"]
    median: Float[np.ndarray, " rows"]
    high: Float[np.ndarray, " rows"]
    scale: Float[np.ndarray, " rows"]
    raw: Float[np.ndarray, "4 rows"]
    central: Float[np.ndarray, "3 rows"]
    far: Bool[np.ndarray, " rows"]

    @classmethod
    def zeros(cls, rows: int, dtype: np.dtype) -> "_Sums":
        low, median, high = np.zeros((3, rows), dtype)
        raw, central = np.zeros((4, rows)), np.zeros((3, rows))
        return cls(low, median, high, np.ones(rows), raw, central, np.zeros(rows, bool))

    def of(self, rows: slice) -> "_Sums":
        """Of some rows, to be written into."""
        return _Sums(*(part[..., rows] for part in self))

    @property
    def mean(self) -> Float[np.ndarray, " rows"]:
        """Of scaled values; rounding does not push it past the extremes.

        Inside them, equal values leave no spread at all.
        """
        return np.clip(self.raw[0], self.low * self.scale, self.high * self.scale)


def _lower_median(block: np.ndarray, room: np.ndarray | None) -> np.ndarray:
    middle, ordered = (block.shape[1] - 1) // 2, block
    if room is not None:
        ordered = room[: len(block)]
        np.copyto(ordered, block)
    if block.shape[1] <= _SORT_UP_TO:
        ordered.sort(axis=1)
    else:
        ordered.partition(middle, axis=1)
    return ordered[:, middle]


def _add_moments(
    sums: _Sums, block: np.ndarray, room: np.ndarray, spread: bool, higher: bool
) -> None:
    # Fourth powers of float32 values always fit float64; those of float64 values need not.
    wide = block.dtype == np.float64
    if wide:
        sums.scale[:] = power_of_two_scale(np.maximum(-sums.low, sums.high))
    tiles = _Tiles(block, sums.scale[:, None] if wide else None, room)
    sums.raw[:] = _raw_moments(tiles, spread, higher)
    far = spread & (FAR * sums.raw[0] ** 2 > sums.raw[1])
    if far.any():
        some = _Tiles(block[far], sums.scale[far, None] if wide else None, room)
        sums.far[:] = far
        sums.central[:, far] = _central_moments(some, sums.mean[far], higher)


def _moment_statistics(
    sums: _Sums, count: int, spread: bool, higher: bool
) -> dict[str, np.ndarray]:
    mean = sums.mean
    found = {"mean": unscale(mean, sums.scale)}
    if not spread:
        return found
    central = _about_mean(mean, *sums.raw[1 : 4 if higher else 2])
    moments = np.where(sums.far, sums.central[: len(central)], central)
    found |= shape_statistics(*moments, count=count)
    found["std"] = unscale(found["std"], sums.scale)
    return found


def _raw_moments(tiles: "_Tiles", spread: bool, higher: bool) -> Float[np.ndarray, "4 rows"]:
    """Means of first to fourth powers, as far as they are asked for; zeros for the others."""
    sums = np.zeros((4, len(tiles.block)))
    for tile in tiles:
        sums[0] += tile.sum(axis=1)
        if spread:
            sums[1] += np.vecdot(tile, tile)
        if higher:
            squared = tiles.squared(tile)
            sums[2] += np.vecdot(squared, tile)
            sums[3] += np.vecdot(squared, squared)
    return sums / tiles.block.shape[1]


def _about_mean(mean: np.ndarray, second: np.ndarray, *higher: np.ndarray) -> np.ndarray:
    """Central moments from means of powers: exact enough while the mean is small beside them."""
    square = mean**2
    if not higher:
        return (second - square)[None]
    third, fourth = higher
    return np.array(
        (
            second - square,
            third - mean * (3 * second - 2 * square),
            fourth - mean * (4 * third - mean * (6 * second - 3 * square)),
        )
    )


class _Tiles:
    """A block as consecutive float64 tiles of columns, scaled, small enough for the cache."""

    def __init__(self, block: np.ndarray, scale: np.ndarray | None, room: np.ndarray) -> None:
        self.block = block
        self.scale = scale
        self.room = room

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each in the memory of the one before."""
        for start in range(0, self.block.shape[1], _BLOCK_VALUES):
            part = self.block[:, start : start + _BLOCK_VALUES]
            tile = self._like(part, 0)
            if self.scale is None:
                np.copyto(tile, part)
            else:
                np.multiply(part, self.scale, out=tile)
            yield tile

    def squared(self, tile: np.ndarray) -> np.ndarray:
        """Squares of a tile."""
        return np.multiply(tile, tile, out=self._like(tile, 1))

    def _like(self, part: np.ndarray, which: int) -> np.ndarray:
        return self.room[which].ravel()[: part.size].reshape(part.shape)


def _central_moments(tiles: _Tiles, mean: np.ndarray, higher: bool) -> np.ndarray:
    sums = np.zeros((3, len(mean)))
    for centred in tiles:
        centred -= mean[:, None]
        sums[0] += np.vecdot(centred, centred)
        if higher:
            squared = tiles.squared(centred)
            sums[1] += np.vecdot(squared, centred)
            sums[2] += np.vecdot(squared, squared)
    return sums / tiles.block.shape[1]


@lru_cache(maxsize=1)
def _expansion() -> tuple[tuple[int, int, int, int, int], ...]:
    """Terms (k, multinomial, p, q, r) of (Aβ)^p (Bα)^q (αβ)^r with p + q + r = k that survive."""
    terms = []
    for power in (2, 3, 4):
        for p, q in product(range(power + 1), repeat=2):
            r = power - p - q
            if r >= 0 and p + r != 1 and q + r != 1:
                factor = factorial(power) // (factorial(p) * factorial(q) * factorial(r))
                terms.append((power, factor, p, q, r))
    return tuple(terms)


def _vector_moments(x: np.ndarray, higher: bool) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Mean, central moments 0 to 2 or 4 and power-of-two scale of ascending rows, after scaling."""
    low, high = x[:, 0], x[:, -1]
    scale = power_of_two_scale(np.maximum(-low, high))
    centred = x * scale[:, None]
    mean = np.clip(centred.sum(axis=1) / x.shape[1], low * scale, high * scale)
    centred -= mean[:, None]
    pairs = [(centred, centred)]
    if higher:
        squared = centred * centred
        pairs += [(squared, centred), (squared, squared)]
    central = [np.vecdot(left, right) / x.shape[1] for left, right in pairs]
    return mean, [np.ones(len(x)), np.zeros(len(x)), *central], scale
