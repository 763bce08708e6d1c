"""Whether two updates are the same numbers: a hash of their canonical form."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

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
            if all(sides):
                counts = " ".join(str(len(side)) for side in sides)
                digest.update(f"{where} {what}{counts}\n".encode())
                for side in sides:
                    for component in side:
                        digest.update(component.data)
    return digest.hexdigest()


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


def _spelt(found: Mapping[str, Update]) -> dict[str, tuple[str, list[list[np.ndarray]]]]:
    """What they are, and their canonical components: of one product, or of two of Kronecker's."""
    spelt: dict[str, tuple[str, list[list[np.ndarray]]]] = {}
    plain: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for where, (down, up, scale) in found.items():
        if isinstance(down, KroneckerProduct) and isinstance(up, KroneckerProduct):
            spelt[where] = f"kronecker {up.rows} ", _kronecker_components(down, up, scale)
        else:
            plain[where] = formed(down), formed(up)
    for places, down, up in stacks(plain, np.float32):
        scales = [found[where][2] for where in places]
        for where, side in zip(places, _components(down, up, scales), strict=True):
            spelt[where] = "", [side]
    return spelt


def _components(
    down: np.ndarray, up: np.ndarray, scales: Sequence[float], power: float = 1.0
) -> Iterator[list[np.ndarray]]:
    """Rank-1 components in a form that exact changes of their spelling leave alone, sorted."""
    for joined in _canonical(down, up, scales, power):
        # In the order of their bytes; most differ in their first numbers.
        keys = joined[:, :1].copy().view(">u8").ravel().tolist()
        if len(set(keys)) < len(keys):
            keys = [row.tobytes() for row in joined]
        yield [joined[k] for k in sorted(range(len(keys)), key=keys.__getitem__)]


def _canonical(
    down: np.ndarray, up: np.ndarray, scales: Sequence[float], power: float = 1.0
) -> Iterator[Float[np.ndarray, "n inputs_and_outputs"]]:
    """Components that are not zero: rows of A led by a positive number, the largest below one.

    Args:
        down: As of `stacks`, in float32.
        up: The same.
        scales: Of the updates.
        power: Of two, with a sign, which multiplies B exactly.

    Yields:
        Of each update, rows of A beside columns of B, in little-endian float64.
    """
    # A file's float32 factors and scale give float32 products, as when the scale is folded in.
    columns = (up * np.array(scales, np.float32)[:, None, None]).transpose(0, 2, 1)
    lead = down[:, :, 0]
    there: np.ndarray | None = None
    # Most have no zero among their first numbers.
    if np.count_nonzero(lead) < lead.size or np.count_nonzero(columns[:, :, 0]) < lead.size:
        there = np.logical_and(down.any(axis=2), columns.any(axis=2))
        first = (down != 0).argmax(axis=2)[:, :, None]
        lead = np.take_along_axis(down, first, axis=2)[:, :, 0]
    largest = np.maximum(down.max(axis=2, initial=0), -down.min(axis=2, initial=0))
    # Powers of two of float32 are exact in float64.
    shift = np.copysign(np.ldexp(1.0, -np.frexp(largest)[1]), lead)[:, :, None]
    joined = np.empty((*down.shape[:2], down.shape[2] + up.shape[1]), "<f8")
    np.multiply(down, shift, out=joined[:, :, : down.shape[2]])
    np.multiply(columns, power / shift, out=joined[:, :, down.shape[2] :])
    # Turns -0.0 into 0.0.
    joined += 0.0
    for k, rows in enumerate(joined):
        yield rows if there is None else rows[there[k]]


def _kronecker_components(
    down: KroneckerProduct, up: KroneckerProduct, scale: float
) -> list[list[np.ndarray]]:
    """Those of the two sides; what is free between them, a sign and a power of two, is taken out.

    The same update as a plain product has another hash: forming it may take all memory.
    """
    first, second = _alone(down.first, up.first), _alone(down.second, up.second)
    (joined,) = _canonical(*first, [scale])
    if not len(joined):
        return [[]]
    inputs = down.first.shape[1]
    columns = joined[:, inputs:]
    row = columns[np.lexsort(joined[:, :inputs].T[::-1])[0]]
    lead = row[np.flatnonzero(row)[0]]
    shift = float(np.copysign(np.ldexp(1.0, -np.frexp(np.abs(columns).max())[1]), lead))
    sides = _components(*first, [scale], shift), _components(*second, [1.0], 1 / shift)
    return [next(side) for side in sides]


def _alone(down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `stacks` has them, of one module."""
    return down[None].astype(np.float32, copy=False), up[None].astype(np.float32, copy=False)
