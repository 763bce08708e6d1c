"""Whether two updates are the same numbers: a hash of their canonical form."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_ws.functional.hadamard import PairProducts
from lora_ws.functional.kronecker import KroneckerProduct
from lora_ws.functional.update_modules import (
    CACHED,
    Factor,
    Modules,
    checked,
    formed,
    place,
    stacks,
)

# A, B and scale.
Update = tuple[Factor, Factor, float]
# Rows, or a matrix of them.
Components = list[np.ndarray] | np.ndarray
# What a module is, and its canonical components: of one product, or of two.
Spelling = tuple[str, list[Components]]
# Components that are sorted by a product of matrices.
FEW = 8
# Numbers of both factors up to which an elementwise product of products is formed: 32 MiB.
FORMED = 1 << 23


def update_hash(modules: Modules) -> str:
    """SHA-256 of the effective update in a canonical form: equal only for the same numbers.

    Blind to what floating point does without rounding: names of tensors, order of modules and of
    rank components, signs and powers of two moved between A, B and scale, components and modules
    that are zero, and number types that hold the values exactly. Any other scale is folded into B
    in float32, as converters do. Rounding to another type, or another split of the update, changes
    the hash; `sketch` is for those.

    Args:
        modules: Of one adapter, as for `sketch`.

    Returns:
        64 hexadecimal digits.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> down, up = np.array([[3.0, 4.0]]), np.array([[2.0], [1.0]])
        >>> a = update_hash([("to_v", down, up, 1.0)])
        >>> a == update_hash([("to_v", -down, up, -1.0)])
        True
        >>> a == update_hash([("to_v", down, up, 3.0)])
        False
    """
    found = {place(n, down, up): (down, up, s) for n, down, up, s in checked(modules)}
    digest = hashlib.sha256()
    for block in _blocks(found):
        for where, (what, sides) in sorted(_spelt(block).items()):
            feed(digest, f"{where} {what}", sides)
    return digest.hexdigest()


def feed(digest: Any, what: str, sides: Sequence[Components]) -> None:
    """Hash one module on.

    Args:
        digest: Of the modules before it, in the order of their places.
        what: Where it is, and what.
        sides: Its canonical components: of one product, or of two of Kronecker's.
    """
    if all(map(len, sides)):
        counts = " ".join(str(len(side)) for side in sides)
        digest.update(f"{what}{counts}\n".encode())
        for side in sides:
            for component in [side.ravel()] if isinstance(side, np.ndarray) else side:
                digest.update(component.data)


def _blocks(found: Mapping[str, Update]) -> Iterator[dict[str, Update]]:
    """Updates in the order of their places, as many at a time as stay in a cache."""
    block: dict[str, Update] = {}
    size = 0
    for where in sorted(found):
        block[where] = down, up, _ = found[where]
        size += down.shape[0] * (down.shape[1] + up.shape[0])
        if size >= CACHED:
            yield block
            block, size = {}, 0
    yield block


def _spelt(found: Mapping[str, Update]) -> dict[str, Spelling]:
    spelt: dict[str, Spelling] = {}
    plain: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for where, (down, up, scale) in found.items():
        if isinstance(down, np.ndarray) and isinstance(up, np.ndarray):
            plain[where] = down, up
        else:
            spelt[where] = spelling(down, up, scale)
    for places, down, up in stacks(plain, np.float32):
        scales = [found[where][2] for where in places]
        parts = components(down, up.transpose(0, 2, 1), scales)
        for where, side in zip(places, parts, strict=True):
            spelt[where] = "", [side]
    return spelt


def components(
    down: Float[np.ndarray, "n rank inputs"],
    columns: Float[np.ndarray, "n rank outputs"],
    scales: Sequence[float],
    power: float = 1.0,
) -> Iterator[Components]:
    """Rank-1 components in a form that exact changes of their spelling leave alone, sorted.

    Args:
        down: A of n updates, float32.
        columns: B of each, transposed, float32.
        scales: Of the updates.
        power: Of two, with a sign, which multiplies B exactly.

    Yields:
        Of each update, rows of A beside columns of B, in little-endian float64.
    """
    joined, there = _canonical(down, columns, scales, power)
    if there is not None:
        yield from (_in_order(rows[some]) for rows, some in zip(joined, there, strict=True))
        return
    keys = _first_bytes(joined[:, :, 0])
    order = keys.argsort(axis=1)
    ordered = np.take_along_axis(keys, order, axis=1)
    alike = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1).tolist()
    few = joined.shape[1] <= FEW
    for rows, places, same in zip(joined, order.tolist(), alike, strict=True):
        if same:
            yield _in_order(rows)
        else:
            yield rows if few else [rows[place] for place in places]


def _first_bytes(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of the bytes of float64."""
    return numbers.astype("<f8").view(">u8").astype(np.uint64)


def _in_order(rows: Float[np.ndarray, "n both"]) -> list[np.ndarray]:
    """In the order of their bytes; most differ in their first numbers."""
    keys = rows[:, :1].copy().view(">u8").ravel().tolist()
    if len(set(keys)) < len(keys):
        keys = [row.tobytes() for row in rows]
    return [rows[k] for k in sorted(range(len(keys)), key=keys.__getitem__)]


def _canonical(
    down: np.ndarray, columns: np.ndarray, scales: Sequence[float], power: float = 1.0
) -> tuple[Float[np.ndarray, "n rank both"], np.ndarray | None]:
    """Components as of `components`, and which of them are not zero.

    Rows of A are led by a positive number, their largest is below one. Where there are few and
    none is zero they are in the order of their first numbers, else in the order they came in.

    Returns:
        Rows of A beside columns of B, and a mask ``[n, rank]``; None where all of them count.
    """
    inputs = down.shape[2]
    # A file's float32 factors and scale give float32 products, as when the scale is folded in.
    columns = columns * np.array(scales, np.float32)[:, None, None]
    lead = down[:, :, 0]
    there: np.ndarray | None = None
    # Most have no zero among their first numbers.
    if np.count_nonzero(lead) < lead.size or np.count_nonzero(columns[:, :, 0]) < lead.size:
        there = np.logical_and(down.any(axis=2), columns.any(axis=2))
        first = (down != 0).argmax(axis=2)[:, :, None]
        lead = np.take_along_axis(down, first, axis=2)[:, :, 0]
    # Bits of floats without their signs are in the order of their sizes.
    largest = (down.view(np.int32) & 0x7FFF_FFFF).max(axis=2, initial=0).view(np.float32)
    # Powers of two of float32 are exact in float64.
    shift = np.copysign(np.ldexp(1.0, -np.frexp(largest)[1]), lead)
    joined = np.empty((*down.shape[:2], inputs + columns.shape[2]), "<f8")
    order = _first_bytes(down[:, :, 0] * shift + 0.0).argsort(axis=1)
    for factor, rows, out in (
        (shift, down, joined[:, :, :inputs]),
        (power / shift, columns, joined[:, :, inputs:]),
    ):
        wide = rows.astype(np.float64)
        if there is None and down.shape[1] <= FEW:
            # Of few rows a matrix multiplies and sorts at once; each of its rows has one number.
            np.matmul(_sorting(factor, order), wide, out=out)
        else:
            # A product of arrays takes three times as long.
            np.einsum("nri,nr->nri", wide, factor, out=out)
    # Turns -0.0 into 0.0.
    joined += 0.0
    return joined, there


def _sorting(factor: np.ndarray, order: np.ndarray) -> Float[np.ndarray, "n rank rank"]:
    """Matrices that multiply rows by numbers and put them into an order."""
    n, rank = order.shape
    found = np.zeros((n, rank, rank))
    chosen = np.take_along_axis(factor, order, axis=1)
    found[np.arange(n)[:, None], np.arange(rank), order] = chosen
    return found


def spelling(down: Factor, up: Factor, scale: float) -> Spelling:
    """What a module is, and its components; of products of products those of the two sides.

    What is free between sides, a sign and a power of two, is taken out. Such a product and the
    same update as a plain one have two hashes, where forming it would take too much.

    Args:
        down: A.
        up: B.
        scale: Of the update.
    """
    if isinstance(down, KroneckerProduct) and isinstance(up, KroneckerProduct):
        first, second = _alone(down.first, up.first), _alone(down.second, up.second)
        shift = _free(*first, scale)
        shifts = (shift, 1 / shift) if shift else (0.0, 0.0)
        return f"kronecker {up.rows} ", _two_sides((first, second), scale, shifts)
    large = sum(map(math.prod, (down.shape, up.shape))) > FORMED
    if large and isinstance(down, PairProducts) and isinstance(up, PairProducts):
        return "hadamard ", _hadamard(down, up, scale)
    return "", [next(components(*_alone(formed(down), formed(up)), [scale]))]


def _hadamard(down: PairProducts, up: PairProducts, scale: float) -> list[Components]:
    sides = [_alone(down.first, up.first.T), _alone(down.second, up.second.T)]
    shifts = [_free(*side, 1.0) for side in sides]
    if not all(shifts):
        return [[]]
    # Which of them comes first is free too.
    said = [
        b"".join(row.tobytes() for row in next(components(*side, [1.0], shift)))
        for side, shift in zip(sides, shifts, strict=True)
    ]
    one, other = sorted((0, 1), key=said.__getitem__)
    return _two_sides((sides[one], sides[other]), scale, (1 / shifts[other], shifts[other]))


def _two_sides(
    sides: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    scale: float,
    shifts: tuple[float, float],
) -> list[Components]:
    """Components of two sides, each multiplied by a power of two; none where that is 0."""
    if not all(shifts):
        return [[]]
    found = zip(sides, (scale, 1.0), shifts, strict=True)
    return [next(components(*side, [times], shift)) for side, times, shift in found]


def _free(down: np.ndarray, columns: np.ndarray, scale: float) -> float:
    """The power of two, with a sign, that a side is multiplied by; 0 where the side is zero."""
    found, there = _canonical(down, columns, [scale])
    joined = found[0] if there is None else found[0][there[0]]
    if not len(joined):
        return 0.0
    inputs = down.shape[2]
    written = joined[:, inputs:]
    row = written[np.lexsort(joined[:, :inputs].T[::-1])[0]]
    lead = row[np.flatnonzero(row)[0]]
    return float(np.copysign(np.ldexp(1.0, -np.frexp(np.abs(written).max())[1]), lead))


def _alone(down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `components` takes them, of one module."""
    return down[None].astype(np.float32, copy=False), up.T[None].astype(np.float32, copy=False)
