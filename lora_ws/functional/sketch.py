"""What two adapters have in common, by their effective updates ``dW = scale * up @ down``.

Three answers of rising cost, none of which depends on how a file spells the update:

* `update_hash`: whether the updates are the same numbers;
* `sketch`: a few hundred numbers per adapter, whose cosine estimates that of the updates;
* `overlap`: the exact cosine, and what the updates write and read in common.

An adapter is an iterable of modules ``(name, down, up, scale)``. Modules of the same name and
widths are compared; one that an adapter lacks counts as an update of zero.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError
from lora_ws.functional.delta_gram import delta_gram, update_norms

Module = tuple[str, np.ndarray, np.ndarray, float]
Modules = Iterable[Module]
SIDE = 16
# Names this way of sketching. Another one gets another name, as their sketches do not compare.
METHOD = "lora_ws bilinear signs 1"


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
    norms = [abs(s) * update_norms(down[None], up[None])[0] for _, down, up, s in checked(modules)]
    return float(np.linalg.norm(norms))


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
    found = {_place(n, down, up): _components(down, up, s) for n, down, up, s in checked(modules)}
    digest = hashlib.sha256()
    for place in sorted(found):
        if found[place]:
            digest.update(f"{place} {len(found[place])}\n".encode())
            digest.update(b"".join(found[place]))
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
    mine = {_place(n, down, up): (down, up, s) for n, down, up, s in checked(a)}
    others = {_place(n, down, up): (down, up, s) for n, down, up, s in checked(b)}
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


@lru_cache(maxsize=1024)
def _signs(place: str, side: int, width: int) -> Float[np.ndarray, "side width"]:
    """Signs from the bits of SHAKE-256: the same on any machine, whatever the version of numpy."""
    stream = hashlib.shake_256(f"{METHOD} {place}".encode()).digest(-(-side * width // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=side * width)
    signs = (1 - 2 * bits.astype(np.float32)).reshape(side, width)
    signs.flags.writeable = False
    return signs


def _place(name: str, down: np.ndarray, up: np.ndarray) -> str:
    return f"{name} {up.shape[-2]}x{down.shape[-1]}"


def _components(down: np.ndarray, up: np.ndarray, scale: float) -> list[bytes]:
    """Rank-1 components in a form that exact changes of their spelling leave alone, sorted."""
    # A file's float32 factors and scale give float32 products, as when the scale is folded in.
    rows = down.astype(np.float32).astype(np.float64)
    columns = (up.astype(np.float32) * np.float32(scale)).astype(np.float64).T
    found = []
    for row, column in zip(rows, columns, strict=True):
        if not (row.any() and column.any()):
            continue
        exponent = np.frexp(np.abs(row).max())[1]
        sign = np.sign(row[np.flatnonzero(row)[0]])
        # Adding zero turns -0.0 into 0.0.
        pair = (sign * np.ldexp(row, -exponent), sign * np.ldexp(column, exponent))
        found.append(b"".join((part + 0.0).astype("<f8").tobytes() for part in pair))
    return sorted(found)


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
