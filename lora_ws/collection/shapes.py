"""Shapes of the matrices of a row, those in flat lists by the base model's widths."""

from collections import Counter
from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lora_ws.adapters.bases import CONTEXTS, reads_text
from lora_ws.adapters.layout import KNOWN_LAYOUTS
from lora_ws.adapters.model_classes import model_classes, template
from lora_ws.collection.decode import is_list
from lora_ws.errors import DataError

# Module path and role -> shape of its matrix.
Shapes = dict[str, dict[str, tuple[int, ...]]]
Sizes = frozenset[tuple[int, int]]


class _Flat(NamedTuple):
    """How many numbers the flat lists of a module hold."""

    down: int
    up: int


def first_shapes(columns: Mapping[tuple[str, str], pa.Array], said: Any = None) -> Shapes:
    """Shapes of the matrices in the first row.

    Nested lists have a shape. Flat lists have one by the row's rank, which is said, or follows from
    how many numbers they hold, and how wide the modules of a known base model are.

    Args:
        columns: module path and role (down or up) -> a list column.
        said: what a column ``rank`` holds, as a number or its text; None where there is none.

    Raises:
        DataError: flat lists fit no rank, or several.

    Example:
        >>> path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        >>> flat = {(path, role): pa.array([[0.5] * 2560]) for role in ("down", "up")}
        >>> first_shapes(flat, said="2")[path]
        {'down': (2, 1280), 'up': (1280, 2)}
    """
    found: Shapes = {}
    lengths: dict[str, dict[str, int]] = {}
    for (path, role), column in columns.items():
        shape = _lengths(column)
        found.setdefault(path, {})[role] = shape
        if len(shape) == 1:
            lengths.setdefault(path, {})[role] = shape[0]
    if not lengths:
        return found
    flat = {
        path: _Flat(pair["down"], pair["up"]) for path, pair in lengths.items() if len(pair) == 2
    }
    rank = _said_rank(said) or _rank_of(flat)
    for path, pair in lengths.items():
        for role, length in pair.items():
            if not length or length % rank:
                raise DataError(
                    f"`{path}`, {role}: expected a multiple of {rank} numbers, as of rank {rank}, "
                    f"got {length}"
                )
            other = length // rank
            found[path][role] = (rank, other) if role == "down" else (other, rank)
    return found


def _lengths(column: pa.Array) -> tuple[int, ...]:
    """Lengths of the nested lists of the first row."""
    lengths = []
    while is_list(column.type):
        first = column.slice(0, 1)
        length = pc.list_value_length(first)[0].as_py() if len(first) else None  # pyright: ignore[reportAttributeAccessIssue]
        lengths.append(int(length or 0))
        column = first.flatten()
    return tuple(lengths)


def _said_rank(said: Any) -> int:
    """What a cell says of the rank; 0 where it says none."""
    try:
        rank = float(said)
    except (TypeError, ValueError):
        return 0
    return int(rank) if rank >= 1 and rank.is_integer() else 0


def _rank_of(flat: Mapping[str, _Flat]) -> int:
    """The only rank that all modules have."""
    fits: set[int] = set()
    nearest = (0, 0, dict[str, Sizes]())
    for sizes in _bases(flat):
        counts = Counter(rank for path, own in flat.items() for rank in _ranks(own, sizes[path]))
        fits |= {rank for rank, count in counts.items() if count == len(flat)}
        for rank, count in counts.items():
            nearest = max(nearest, (count, -rank, sizes), key=lambda one: one[:2])
    if not fits:
        count, rank, sizes = nearest[0], -nearest[1], nearest[2]
        if 2 * count > len(flat):
            path = next(p for p, own in flat.items() if rank not in _ranks(own, sizes[p]))
            inputs, outputs = min(sizes[path])
            own = flat[path]
            raise DataError(
                f"`{path}`: expected flat lists of rank {rank}, as those of {count} of "
                f"{len(flat)} modules, such as {rank * inputs} and {rank * outputs} numbers, got "
                f"{own.down} and {own.up}"
            )
        # Of an unknown model: what divides all may be the rank.
        common = gcd(*(length for own in flat.values() for length in own))
        fits = {rank for rank in range(1, common + 1) if common % rank == 0}
    if len(fits) != 1:
        some = ", ".join(map(str, sorted(fits)[:5])) or "none"
        raise DataError(
            f"flat lists without a rank: their lengths fit {some}; add a column `rank`, or write "
            "lists of lists"
        )
    return fits.pop()


def _ranks(own: _Flat, sizes: Sizes) -> set[int]:
    """Ranks at which a module of one of these sizes has so many numbers."""
    return {
        own.down // inputs
        for inputs, outputs in sizes
        if own.down and own.down % inputs == 0 and own.up == outputs * (own.down // inputs)
    }


def _bases(flat: Mapping[str, _Flat]) -> Iterator[Mapping[str, Sizes]]:
    """Sizes of the modules in each base model that has them all; exact ones alone if any fit."""
    known = False
    for make in KNOWN_LAYOUTS.values():
        exact = {
            layer.name: frozenset({(layer.in_features, layer.out_features)})
            for layer in make().layers
        }
        if flat.keys() <= exact.keys() and all(_ranks(own, exact[p]) for p, own in flat.items()):
            known = True
            yield exact
    if known:
        return
    names = {path: template(path) for path in flat}
    stable_diffusion, *_ = model_classes().values()
    for kind in model_classes().values():
        if kind.modules.keys() >= set(names.values()):
            sizes = {path: kind.modules[name] for path, name in names.items()}
            yield from _with_contexts(sizes) if kind == stable_diffusion else [sizes]


def _with_contexts(sizes: Mapping[str, Sizes]) -> Iterator[Mapping[str, Sizes]]:
    """The same for each text encoder that published models of the class have."""
    for context in CONTEXTS:
        yield {
            path: frozenset((context, outputs) for _, outputs in pairs)
            if reads_text(path)
            else pairs
            for path, pairs in sizes.items()
        }
