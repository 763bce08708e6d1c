"""Norms, sketch and hash of many adapters at once: what a scan without a model is made of.

Each module is taken of all adapters together, so that random signs, and calls of numpy, which cost
more than a small module's numbers do, are shared; the numbers of the module stay in a cache from
the first result to the last.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.functional.sketch import (
    SIDE,
    factor_norm,
    low_rank_norms,
    module_norms,
    place_signs,
    sketch,
)
from lora_ws.functional.update_hash import Spelling, components, feed, spelling, update_hash
from lora_ws.functional.update_modules import CACHED, Factor, Module, Modules, checked, place


class Measured(NamedTuple):
    """What is known of an adapter by its effective update.

    Attributes:
        norms: Frobenius norm of each module, as `module_norms`.
        sketch: As `sketch`.
        hash: As `update_hash`; empty where it was not asked for.
    """

    norms: Float[np.ndarray, " modules"]
    sketch: Float[np.ndarray, " size"]
    hash: str


# Adapters of the same modules from which on it pays to take a module of all of them together.
FEWEST = 3
# A, B and scale, of matrices.
Plain = tuple[np.ndarray, np.ndarray, float]


class _Place(NamedTuple):
    """A module of one of the adapters: which, and which of its modules."""

    adapter: int
    column: int


class _Some(NamedTuple):
    """What was found of a module of n adapters."""

    norms: Float[np.ndarray, " n"]
    products: Float[np.ndarray, "n side side"]
    spellings: list[Spelling]


def measure(
    adapters: Sequence[Modules], *, side: int = SIDE, hashes: bool = True
) -> list[Measured]:
    """Measure adapters together; each comes out as it would alone.

    Args:
        adapters: Of each, its modules, as for `sketch`; they need not have the same.
        side: Of the sketches.
        hashes: Whether hashes are wanted.

    Raises:
        ConfigError: As for `sketch`.

    Example:
        >>> modules = [("to_v", np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]), 0.5)]
        >>> one, two = measure([modules, []])
        >>> one.norms.tolist(), one.sketch.shape, two.norms.tolist()
        ([5.0], (256,), [])
    """
    found = [list(modules) for modules in adapters]
    alike: dict[tuple[str, ...], list[int]] = {}
    for row, modules in enumerate(found):
        alike.setdefault(tuple(place(*module[:3]) for module in modules), []).append(row)
    measured: dict[int, Measured] = {}
    for rows in alike.values():
        some = [found[row] for row in rows]
        act = _together if len(rows) >= FEWEST else _each
        measured |= zip(rows, act(some, side, hashes), strict=True)
    return [measured[row] for row in range(len(found))]


def _each(adapters: Sequence[list[Module]], side: int, hashes: bool) -> list[Measured]:
    """One after the other, modules of a shape together."""
    return [
        Measured(module_norms(one), sketch(one, side), update_hash(one) if hashes else "")
        for one in adapters
    ]


def _together(adapters: Sequence[list[Module]], side: int, hashes: bool) -> list[Measured]:
    """A module of all of them after the other."""
    found = [list(checked(modules)) for modules in adapters]
    norms = [[0.0] * len(modules) for modules in found]
    totals = np.zeros((len(found), side, side))
    digests = [hashlib.sha256() for _ in found]
    for where, here in sorted(_by_place(found).items()):
        for places, some in _measured(where, here, side, hashes):
            totals[[place.adapter for place in places]] += some.products / side
            for (row, column), norm in zip(places, some.norms.tolist(), strict=True):
                norms[row][column] = norm
            for (row, _), (what, sides) in zip(places, some.spellings, strict=hashes):
                feed(digests[row], f"{where} {what}", sides)
    told = [digest.hexdigest() if hashes else "" for digest in digests]
    return [
        Measured(np.array(sizes), total.ravel(), hashed)
        for sizes, total, hashed in zip(norms, totals, told, strict=True)
    ]


def _by_place(found: Sequence[Sequence[Module]]) -> dict[str, dict[_Place, Module]]:
    places: dict[str, dict[_Place, Module]] = {}
    for row, modules in enumerate(found):
        for column, module in enumerate(modules):
            where = place(*module[:3])
            places.setdefault(where, {})[_Place(row, column)] = module
    return places


def _measured(
    where: str, here: Mapping[_Place, Module], side: int, hashes: bool
) -> Iterator[tuple[Sequence[_Place], _Some]]:
    """Measure a module of all adapters: of one shape together, as many as a cache holds."""
    _, down, up, _ = next(iter(here.values()))
    signs = place_signs(where, side, up.shape[0], down.shape[1])
    alike: dict[int, dict[_Place, Plain]] = {}
    for at, (_, down, up, scale) in here.items():
        if isinstance(down, np.ndarray) and isinstance(up, np.ndarray):
            alike.setdefault(len(down), {})[at] = down, up, scale
        else:
            yield [at], _product(down, up, scale, signs, hashes)
    for rank, plains in alike.items():
        places = list(plains)
        step = max(1, CACHED // max(1, rank * sum(rows.shape[1] for rows in signs)))
        for start in range(0, len(places), step):
            some = places[start : start + step]
            yield some, _plain([plains[at] for at in some], signs, hashes)


def _product(
    down: Factor,
    up: Factor,
    scale: float,
    signs: tuple[np.ndarray, np.ndarray],
    hashes: bool,
) -> _Some:
    write, read = signs
    product = (write @ up.astype(np.float64)) @ (down.astype(np.float64) @ read.T)
    spelt = [spelling(down, up, scale)] if hashes else []
    return _Some(np.array([abs(scale) * factor_norm(down, up)]), scale * product[None], spelt)


def _plain(some: Sequence[Plain], signs: tuple[np.ndarray, np.ndarray], hashes: bool) -> _Some:
    """Of factors of one shape."""
    write, read = signs
    scales = np.array([scale for *_, scale in some])
    down, columns = _stacked([a for a, _, _ in some]), _stacked([b.T for _, b, _ in some])
    a, b = down.astype(np.float64), columns.astype(np.float64)
    products = (b @ write.T).transpose(0, 2, 1) @ (a @ read.T)
    if down.shape[1] < min(down.shape[2], columns.shape[2]):
        norms = low_rank_norms(a, b.transpose(0, 2, 1))
    else:
        norms = np.array([factor_norm(*factors) for *factors, _ in some])
    spellings: list[Spelling] = []
    if hashes:
        down, columns = (part.astype(np.float32, copy=False) for part in (down, columns))
        spellings = [("", [parts]) for parts in components(down, columns, scales.tolist())]
    return _Some(np.abs(scales) * norms, scales[:, None, None] * products, spellings)


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Matrices of one shape together; a single one, which may be large, is not copied."""
    return np.concatenate([part[None] for part in parts]) if len(parts) > 1 else parts[0][None]
