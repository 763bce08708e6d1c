"""What two adapters have in common, by their effective updates ``dW = scale * up @ down``.

Three answers of rising cost, none of which depends on how a file spells the update:

* `update_hash`: whether the updates are the same numbers;
* `sketch`: a few hundred numbers per adapter, whose cosine estimates that of the updates;
* `overlap`: the exact cosine, and what the updates write and read in common.

An adapter is an iterable of modules ``(name, down, up, scale)``. Modules of the same name and
widths are compared; one that an adapter lacks counts as an update of zero. Factors that are
Kronecker products are never formed.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError
from lora_ws.functional.delta_gram import delta_gram, update_norms
from lora_ws.functional.kronecker import KroneckerProduct, kronecker_norm
from lora_ws.functional.signs import Signs

Factor = np.ndarray | KroneckerProduct
Module = tuple[str, Factor, Factor, float]
Modules = Iterable[Module]
SIDE = 16
# Names this way of sketching. Another one gets another name, as their sketches do not compare.
METHOD = "lora_ws bilinear signs 1"
# Signs of all modules of SDXL and their likes take half of it.
MOST_SIGNS = 1 << 26
# Share of what it might be below which a sum of products of many signs is not to be trusted.
CANCELLED = 1e-6


def sketch(modules: Modules, side: int = SIDE) -> Float[np.ndarray, "*rows size"]:
    """``sum_l P_l dW_l Q_l^T / side``: a random projection of the whole update, linear in it.

    P_l and Q_l are signs ``[side, out]`` and ``[side, in]`` that hang on the module's name and
    widths alone, so that sketches made anywhere compare. The inner product of two sketches is an
    unbiased estimate of ``sum_l <dW_l, dW'_l>`` (Alon, Matias and Szegedy 1999, "The space
    complexity of approximating the frequency moments", applied to both sides). Where energy is
    spread over modules or directions, the estimate of a cosine c has a variance of about
    ``(1 - c^2)^2 / side^2``: 0.06 is its standard deviation at 0, and next to none is left at 1.
    What two updates share on one side of one module only, such as reading the same direction and
    writing orthogonal ones, fades more slowly: it adds a variance of ``x_l^2 y_l^2 / side``, x_l
    and y_l being the parts of the two norms that the module has.

    Args:
        modules: Of one adapter: finite A ``[rank, in]`` and B ``[out, rank]``; or of n adapters:
            A ``[n, rank, in]``, B ``[n, out, rank]``. Ranks and widths are free.
        side: Rows of the projections.

    Returns:
        Float64 ``[side * side]``, or ``[n, side * side]``; zeros for no modules.

    Raises:
        ConfigError: If factors do not fit each other, are no matrices, or a module comes twice.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> down, up = rng.standard_normal((2, 30)), rng.standard_normal((20, 2))
        >>> mixed = [("to_v", np.diag([2.0, 0.5]) @ down, up @ np.diag([0.5, 2.0]), 1.0)]
        >>> np.allclose(sketch([("to_v", down, up, 1.0)]), sketch(mixed))
        True
    """
    total = None
    for name, down, up, scale in checked(modules, stacks=True):
        write = _signs(f"{_place(name, down, up)} write", side, up.shape[-2])
        read = _signs(f"{_place(name, down, up)} read", side, down.shape[-1])
        # float64, so that factors near the ends of float32 neither overflow nor vanish.
        left = write @ up.astype(np.float64)
        right = down.astype(np.float64) @ read.T
        product = scale / side * (left @ right)
        total = product if total is None else total + product
    if total is None:
        return np.zeros(side * side)
    return total.reshape(*total.shape[:-2], side * side)


def update_norm(modules: Modules) -> float:
    """Frobenius norm of the whole update of one adapter.

    Args:
        modules: Of one adapter, as for `sketch`.

    Returns:
        A norm; 0 for no modules.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> update_norm([("to_v", np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]), 0.5)])
        5.0
    """
    return float(np.linalg.norm(module_norms(modules)))


def module_norms(modules: Modules) -> Float[np.ndarray, " modules"]:
    """Frobenius norms of the updates of each module of one adapter.

    Args:
        modules: As for `sketch`.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> module_norms([("to_v", np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]), 0.5)])
        array([5.])
    """
    return np.array([abs(s) * _factor_norm(down, up) for _, down, up, s in checked(modules)])


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
    found = {_place(n, down, up): (down, up, s) for n, down, up, s in checked(modules)}
    digest = hashlib.sha256()
    for place in sorted(found):
        down, up, scale = found[place]
        if isinstance(down, KroneckerProduct) and isinstance(up, KroneckerProduct):
            sides, what = _kronecker_components(down, up, scale), f"kronecker {up.rows} "
        else:
            sides, what = [_components(_formed(down), _formed(up), scale)], ""
        if all(sides):
            counts = " ".join(str(len(side)) for side in sides)
            digest.update(f"{place} {what}{counts}\n".encode())
            for side in sides:
                for component in side:
                    digest.update(component.data)
    return digest.hexdigest()


class Overlap(NamedTuple):
    """What the updates of two adapters, a and b, have in common.

    Attributes:
        names: Modules of a, then those of b alone.
        cosine: Of the updates of each module, from -1 to 1; 0 where one is zero or missing.
        left: The same of ``dW dW^T``, from 0 to 1: what both write, whatever they read.
        right: The same of ``dW^T dW``: what both read.
        norms: Frobenius norms of the updates of a and of b ``[modules, 2]``.
    """

    names: tuple[str, ...]
    cosine: Float[np.ndarray, " modules"]
    left: Float[np.ndarray, " modules"]
    right: Float[np.ndarray, " modules"]
    norms: Float[np.ndarray, "modules 2"]

    @property
    def total(self) -> tuple[float, float, float]:
        """Cosine, left and right of the whole: the mean over modules, by their norms' products.

        For the cosine this is exactly that of the whole updates. A module that one of them lacks
        weighs on all three as no agreement.
        """
        whole = np.linalg.norm(self.norms, axis=0).prod()
        weights = self.norms.prod(axis=1) / (whole or 1.0)
        cosine, left, right = (float(weights @ v) for v in (self.cosine, self.left, self.right))
        return cosine, left, right

    @property
    def ratio(self) -> float:
        """Norm of b over that of a; NaN where a is zero."""
        mine, other = np.linalg.norm(self.norms, axis=0)
        return float(other / mine) if mine > 0 else float("nan")


def overlap(a: Modules, b: Modules) -> Overlap:
    """Compare the updates of two adapters exactly, from their factors.

    Args:
        a: Modules of one adapter, as for `sketch`.
        b: Modules of another; ranks may differ.

    Returns:
        Agreement by module and, in `Overlap.total`, of the whole.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> down, up = np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]])
        >>> found = overlap([("to_v", down, up, 1.0)], [("to_v", down, up[::-1], 3.0)])
        >>> [round(value, 3) for value in found.total], round(found.ratio, 3)
        ([0.0, 0.0, 1.0], 3.0)
    """
    mine, others = (
        {_place(n, down, up): (_formed(down), _formed(up), s) for n, down, up, s in checked(side)}
        for side in (a, b)
    )
    places = list(dict.fromkeys([*mine, *others]))
    rows = np.zeros((len(places), 5))
    for row, place in zip(rows, places, strict=True):
        both = [side[place] for side in (mine, others) if place in side]
        row[3:] = [_norm(side.get(place)) for side in (mine, others)]
        if len(both) == 2:
            # Of a scale only the sign matters here, and whether it is zero.
            down, up = _stacked([(a, np.sign(scale) * b) for a, b, scale in both])
            row[:3] = [delta_gram(down, up, k)[0, 1] for k in ("delta", "left", "right")]
    names = tuple(place.rsplit(" ", 1)[0] for place in places)
    return Overlap(names, rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:])


def checked(modules: Modules, *, stacks: bool = False) -> Iterator[Module]:
    """Pass modules on, refusing what is not one.

    Args:
        modules: Of one adapter.
        stacks: Whether factors may be those of n adapters, ``[n, rank, in]``, ``[n, out, rank]``.

    Yields:
        The same modules.

    Raises:
        ConfigError: If factors do not fit each other, are no matrices, or a module comes twice.

    Example:
        >>> list(checked([("to_v", np.ones((2, 3)), np.ones((4, 1)), 1.0)]))
        Traceback (most recent call last):
        lora_ws.errors.ConfigError: module `to_v`: expected A [rank, in] and B [out, rank], ...
    """
    seen = set()
    for name, down, up, scale in modules:
        fits = down.ndim == up.ndim in (2, 3 if stacks else 2) and down.shape[-2] == up.shape[-1]
        if not fits or down.shape[:-2] != up.shape[:-2]:
            raise ConfigError(
                f"module `{name}`: expected A [rank, in] and B [out, rank], got {down.shape} and "
                f"{up.shape}; flatten what is no matrix, such as the kernels of convolutions"
            )
        if name in seen:
            raise ConfigError(f"module `{name}`: expected once, got twice; sum their updates first")
        seen.add(name)
        yield name, down, up, scale


_signs = Signs(METHOD, MOST_SIGNS).get


def _formed(factor: Factor) -> np.ndarray:
    return factor.form() if isinstance(factor, KroneckerProduct) else factor


def _factor_norm(down: Factor, up: Factor) -> float:
    """Norm of ``up @ down`` in float64, by the cheapest way that is exact."""
    if isinstance(down, KroneckerProduct) and isinstance(up, KroneckerProduct):
        return kronecker_norm(down, up)
    a, b = _formed(down).astype(np.float64), _formed(up).astype(np.float64)
    rank, inputs = a.shape
    if rank >= min(inputs, len(b)):
        # A whole matrix beside the identity, or so many components that the product is smaller.
        if rank == inputs and np.array_equal(a, np.eye(rank)):
            return float(np.linalg.norm(b))
        if rank == len(b) and np.array_equal(b, np.eye(rank)):
            return float(np.linalg.norm(a))
        return float(np.linalg.norm(b @ a))
    read, written = a @ a.T, b.T @ b
    square, most = float(np.vdot(read, written)), float(read.trace() * written.trace())
    if CANCELLED * most < square < np.inf and most > np.finfo(np.float64).tiny:
        return float(np.sqrt(square))
    return float(update_norms(a[None], b[None])[0])


def _place(name: str, down: Factor, up: Factor) -> str:
    return f"{name} {up.shape[-2]}x{down.shape[-1]}"


def _components(
    down: np.ndarray, up: np.ndarray, scale: float, power: float = 1.0
) -> list[np.ndarray]:
    """Rank-1 components in a form that exact changes of their spelling leave alone, sorted."""
    joined, _ = _canonical(down, up, scale, power)
    # In the order of their bytes; most differ in their first numbers.
    keys = joined[:, :1].copy().view(">u8").ravel().tolist()
    if len(set(keys)) < len(keys):
        keys = [row.tobytes() for row in joined]
    return [joined[k] for k in sorted(range(len(keys)), key=keys.__getitem__)]


def _canonical(
    down: np.ndarray, up: np.ndarray, scale: float, power: float = 1.0
) -> tuple[Float[np.ndarray, "n inputs_and_outputs"], int]:
    """Components that are not zero: rows of A led by a positive number, the largest below one.

    Args:
        down: A.
        up: B.
        scale: of the update.
        power: of two, with a sign, which multiplies B exactly.

    Returns:
        A row beside its column, in little-endian float64; and where the column begins.
    """
    # A file's float32 factors and scale give float32 products, as when the scale is folded in.
    rows = down.astype(np.float32, copy=False)
    columns = (up.astype(np.float32, copy=False) * np.float32(scale)).T
    n, inputs = rows.shape
    # Most have no zero among their first numbers.
    if np.count_nonzero(rows[:, 0]) < n or np.count_nonzero(columns[:, 0]) < n:
        there = rows.any(axis=1) & columns.any(axis=1)
        rows, columns = rows[there], columns[there]
    joined = np.empty((len(rows), inputs + len(up)), "<f8")
    if not len(joined):
        return joined, inputs
    lead = rows[:, 0]
    if np.count_nonzero(lead) < len(lead):
        lead = rows[np.arange(len(rows)), (rows != 0).argmax(axis=1)]
    exponents = np.frexp(np.maximum.reduce(np.abs(rows), axis=1))[1]
    # Powers of two of float32 are exact in float64.
    shift = np.copysign(np.ldexp(1.0, -exponents), lead)[:, None]
    np.multiply(rows, shift, out=joined[:, :inputs])
    np.multiply(columns, power / shift, out=joined[:, inputs:])
    # Turns -0.0 into 0.0.
    joined += 0.0
    return joined, inputs


def _kronecker_components(
    down: KroneckerProduct, up: KroneckerProduct, scale: float
) -> list[list[np.ndarray]]:
    """Those of the two sides; what is free between them, a sign and a power of two, is taken out.

    The same update as a plain product has another hash: forming it may take all memory.
    """
    joined, inputs = _canonical(down.first, up.first, scale)
    if not len(joined):
        return [[]]
    columns = joined[:, inputs:]
    first = columns[np.lexsort(joined[:, :inputs].T[::-1])[0]]
    lead = first[np.flatnonzero(first)[0]]
    shift = float(np.copysign(np.ldexp(1.0, -np.frexp(np.abs(columns).max())[1]), lead))
    sides = (down.first, up.first, scale, shift), (down.second, up.second, 1.0, 1 / shift)
    return [_components(*side) for side in sides]


def _stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Factors of unequal ranks as one stack; rows and columns of zeros change no update."""
    rank = max(len(down) for down, _ in pairs)
    down = [np.pad(a.astype(np.float64), ((0, rank - len(a)), (0, 0))) for a, _ in pairs]
    up = [np.pad(b.astype(np.float64), ((0, 0), (0, rank - b.shape[1]))) for _, b in pairs]
    return np.stack(down), np.stack(up)


def _norm(factors: tuple[np.ndarray, np.ndarray, float] | None) -> float:
    if factors is None:
        return 0.0
    down, up, scale = factors
    return float(abs(scale) * update_norms(down[None], up[None])[0])
