"""Which columns of a flat weight vector are which matrix: `LayerSpec`, `Layout`, known layouts.

A layout is shapes and order only; it holds no values. A layer adapts one linear module with
``down`` (A, ``[rank, in_features]``) and ``up`` (B, ``[out_features, rank]``), so that the update
is ``up @ down``. In the flat vector the layers stand in the natural sort of their names, ``down``
before ``up``, each matrix row-major.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from lora_ws.errors import LayoutError

Role = Literal["down", "up"]


@dataclass(frozen=True)
class LayerSpec:
    """Shapes of the two factors of one adapted linear module.

    Attributes:
        name: dotted module path as diffusers spells it, without ``unet.``.
        in_features: width of the module's input, columns of A.
        out_features: width of the module's output, rows of B.
        rank: rows of A and columns of B.

    Example:
        >>> layer = LayerSpec("mid_block.attn2.to_v", in_features=768, out_features=320, rank=4)
        >>> layer.down_shape, layer.up_shape, layer.size
        ((4, 768), (320, 4), 4352)
    """

    name: str
    in_features: int
    out_features: int
    rank: int = 1

    @property
    def down_shape(self) -> tuple[int, int]:
        """Shape of A."""
        return self.rank, self.in_features

    @property
    def up_shape(self) -> tuple[int, int]:
        """Shape of B."""
        return self.out_features, self.rank

    @property
    def size(self) -> int:
        """How many numbers the two factors hold."""
        return self.rank * (self.in_features + self.out_features)


class Matrix(NamedTuple):
    """One factor and where it stands in the flat vector.

    Example:
        >>> Layout.known("tiny_sd_qv").matrices[1].shape
        (32, 1)
    """

    layer: LayerSpec
    role: Role
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the factor."""
        return self.layer.down_shape if self.role == "down" else self.layer.up_shape

    @property
    def name(self) -> str:
        """``<module path>.<role>``."""
        return f"{self.layer.name}.{self.role}"


class Selection(NamedTuple):
    """Some matrices of a layout, and the columns of the flat vector that hold them.

    Attributes:
        matrices: the chosen ones in column order; their columns count within the selection.
        columns: which columns to take; a slice where they follow each other, so that it is a view.
    """

    matrices: tuple[Matrix, ...]
    columns: slice | np.ndarray

    @property
    def layout(self) -> "Layout":
        """The chosen layers as a layout of their own, whose columns are the selection's.

        Raises:
            LayoutError: only one of a layer's two matrices was chosen.
        """
        return Layout(tuple(layer for layer, _, _ in self.pairs()))

    def pairs(self) -> Iterator[tuple[LayerSpec, slice, slice]]:
        """Yield each layer with the columns of its A and of its B.

        Raises:
            LayoutError: only one of a layer's two matrices was chosen.
        """
        found: dict[str, dict[Role, Matrix]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.layer.name, {})[matrix.role] = matrix
        for name, factors in found.items():
            if len(factors) < 2:
                raise LayoutError(
                    f"expected A and B of every layer, got only `{name}.{next(iter(factors))}`; "
                    "choose whole layers for what needs their product"
                )
            yield factors["down"].layer, factors["down"].columns, factors["up"].columns


class Group(NamedTuple):
    """Modules of equal shape, and the columns of the flat vector that hold their factors.

    With rows ``[adapters, params]``, ``rows[:, group.down]`` are the factors of all modules of the
    group in one gather; ``torch.tensor(group.down)`` makes the index that a network keeps.

    Attributes:
        layers: the modules in the layout's order.
        places: their positions in `Layout.layers`.
        down: columns of A, read-only ``[modules, rank, in_features]``.
        up: columns of B, read-only ``[modules, out_features, rank]``.
    """

    layers: tuple[LayerSpec, ...]
    places: tuple[int, ...]
    down: Int[np.ndarray, "modules rank in_features"]
    up: Int[np.ndarray, "modules out_features rank"]


@dataclass(frozen=True, repr=False)
class Layout:
    """The ordered layers of an adapter, and thereby the meaning of each column.

    Example:
        >>> Layout.sd15_qv()
        Layout(64 layers, rank 1, 99648 parameters, 30d40978803f2c81)
    """

    layers: tuple[LayerSpec, ...]

    def __repr__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        count = f"{len(self.layers)} layers" if len(self.layers) > 1 else "1 layer"
        return f"Layout({count}, {rank}, {self.size} parameters, {self.fingerprint})"

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names:
            raise LayoutError("expected at least one layer, got none: is this an adapter?")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise LayoutError(f"expected each layer once, got `{twice}` more than once")
        for layer in self.layers:
            if min(layer.rank, layer.in_features, layer.out_features) < 1:
                raise LayoutError(f"expected positive sizes, got {layer}")

    @classmethod
    def from_layers(cls, layers: Iterable[LayerSpec]) -> "Layout":
        """Put layers into canonical order."""
        return cls(tuple(sorted(layers, key=lambda layer: (natural_key(layer.name), layer.name))))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> "Layout":
        """Build the layout of one adapter from the shapes of its factors.

        Args:
            shapes: module path -> {"down": (rank, in), "up": (out, rank)}.

        Raises:
            LayoutError: a factor is missing, is not a matrix, or the ranks of the two differ.
        """
        return cls.from_layers(_layer(name, pair) for name, pair in shapes.items())

    @classmethod
    def sd15_qv(cls, rank: int = 1) -> "Layout":
        """Query and value projections of all attention layers of Stable Diffusion 1.5's U-Net."""
        return cls.unet_qv(widths=(320, 640, 1280, 1280), context=768, rank=rank)

    @classmethod
    def unet_qv(cls, widths: tuple[int, ...], context: int, rank: int = 1) -> "Layout":
        """Query and value layers of a U-Net of Stable Diffusion 1.5's topology.

        Args:
            widths: channels of the four resolution levels; the last has no attention outside
                the mid block.
            context: width of the text embedding, input of cross-attention values.
            rank: rank of every layer.
        """
        blocks = [(f"down_blocks.{level}", 2, widths[level]) for level in range(3)]
        blocks += [("mid_block", 1, widths[3])]
        blocks += [(f"up_blocks.{3 - level}", 3, widths[level]) for level in range(3)]
        layers = []
        for block, attentions, width in blocks:
            for index in range(attentions):
                stem = f"{block}.attentions.{index}.transformer_blocks.0"
                layers += [
                    LayerSpec(f"{stem}.attn1.to_q", width, width, rank),
                    LayerSpec(f"{stem}.attn1.to_v", width, width, rank),
                    LayerSpec(f"{stem}.attn2.to_q", width, width, rank),
                    LayerSpec(f"{stem}.attn2.to_v", context, width, rank),
                ]
        return cls.from_layers(layers)

    @classmethod
    def known(cls, name: str) -> "Layout":
        """Return a layout by its name in `KNOWN_LAYOUTS`."""
        if name not in KNOWN_LAYOUTS:
            raise LayoutError(f"expected one of {', '.join(KNOWN_LAYOUTS)}, got layout `{name}`")
        return KNOWN_LAYOUTS[name]()

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """All factors in column order: A then B of the first layer, and so on."""
        found, start = [], 0
        for layer in self.layers:
            middle = start + layer.rank * layer.in_features
            stop = start + layer.size
            found += [Matrix(layer, "down", slice(start, middle))]
            found += [Matrix(layer, "up", slice(middle, stop))]
            start = stop
        return tuple(found)

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(layer.size for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of names, shapes and order; equal layouts have equal fingerprints."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pairs(self) -> Iterator[tuple[LayerSpec, slice, slice]]:
        """Yield each layer with the columns of its A and of its B."""
        for down, up in zip(self.matrices[::2], self.matrices[1::2], strict=True):
            yield down.layer, down.columns, up.columns

    def groups(self) -> tuple[Group, ...]:
        """Modules of equal shape (in, out and rank), in the order of the first of each group.

        Example:
            >>> layout = Layout.sd15_qv()
            >>> [(len(group.layers), group.down.shape) for group in layout.groups()][:2]
            [(15, (15, 1, 320)), (5, (5, 1, 768))]
            >>> rows = np.zeros((10, layout.size), np.float32)
            >>> rows[:, layout.groups()[0].up].shape
            (10, 15, 320, 1)
        """
        return self._groups

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        starts = [matrix.columns.start for matrix in self.matrices]
        members: dict[tuple[int, int, int], list[int]] = {}
        for place, layer in enumerate(self.layers):
            shape = (layer.in_features, layer.out_features, layer.rank)
            members.setdefault(shape, []).append(place)
        found = []
        for places in members.values():
            layers = tuple(self.layers[place] for place in places)
            down = _columns([starts[2 * place] for place in places], layers[0].down_shape)
            up = _columns([starts[2 * place + 1] for place in places], layers[0].up_shape)
            found.append(Group(layers, tuple(places), down, up))
        return tuple(found)

    def at_rank(self, rank: int) -> "Layout":
        """The same layers, all of one rank.

        Example:
            >>> Layout.sd15_qv().at_rank(4) == Layout.sd15_qv(rank=4)
            True
        """
        return Layout(tuple(replace(layer, rank=rank) for layer in self.layers))

    def choose(self, patterns: Sequence[str] | None = None) -> Selection:
        """Choose matrices by name.

        Args:
            patterns: names of layers or matrices, ``*`` standing for anything: ``*.attn2.to_v``
                is A and B of these layers, ``*.up`` every B. None chooses all.

        Raises:
            LayoutError: a pattern fits nothing.

        Example:
            >>> Layout.sd15_qv().choose(["mid_block*.attn2.to_v"]).columns
            slice(43648, 45696, None)
        """
        return _chosen(self, None if patterns is None else tuple(patterns))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Layout":
        """Inverse of `to_dict`; keeps the order it is given."""
        return cls(tuple(LayerSpec(**layer) for layer in data["layers"]))

    def difference(self, other: "Layout") -> str:
        """Say in a few words how `other` differs from this layout; empty if it does not."""
        mine = {layer.name: layer for layer in self.layers}
        theirs = {layer.name: layer for layer in other.layers}
        for name in mine:
            if name not in theirs:
                more = sum(n not in theirs for n in mine) - 1
                return f"no layer `{name}`" + (f" (and {more} more missing)" if more else "")
        for name, layer in theirs.items():
            if name not in mine:
                more = sum(n not in mine for n in theirs) - 1
                return f"extra layer `{name}`" + (f" (and {more} more extra)" if more else "")
            expected = mine[name]
            if layer.rank != expected.rank:
                return f"layer `{name}` has rank {layer.rank}, expected rank {expected.rank}"
            if layer != expected:
                return (
                    f"layer `{name}` maps {layer.in_features} to {layer.out_features}, "
                    f"expected {expected.in_features} to {expected.out_features}"
                )
        return "" if self == other else "the same layers stand in another order"


KNOWN_LAYOUTS = {
    "sd15_qv": Layout.sd15_qv,
    "tiny_sd_qv": lambda: Layout.unet_qv(widths=(32, 64, 64, 64), context=64),
}


@lru_cache(maxsize=32)  # Every transform of a batch asks anew.
def _chosen(layout: Layout, patterns: tuple[str, ...] | None) -> Selection:
    if patterns is None:
        return Selection(layout.matrices, slice(0, layout.size))
    names = [(m.name, m.layer.name) for m in layout.matrices]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for pair in names for name in pair):
            raise LayoutError(
                f"matrices: `{pattern}` fits none of this layout's layers and matrices; they "
                f"are named like `{names[0][0]}`"
            )
    chosen, columns, start = [], [], 0
    for matrix, pair in zip(layout.matrices, names, strict=True):
        if any(fnmatchcase(name, pattern) for pattern in patterns for name in pair):
            width = matrix.columns.stop - matrix.columns.start
            chosen.append(Matrix(matrix.layer, matrix.role, slice(start, start + width)))
            columns.append(matrix.columns)
            start += width
    if not chosen:
        raise LayoutError("matrices: expected at least one pattern, got none")
    places = slice(columns[0].start, columns[-1].stop)
    if places.stop - places.start != start:
        places = np.r_[tuple(columns)]
        places.flags.writeable = False
    return Selection(tuple(chosen), places)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``blocks.10`` after ``blocks.9``."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p)


def _columns(starts: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """Columns of row-major matrices of one shape by where each begins, ``[matrices, *shape]``."""
    inside = np.arange(shape[0] * shape[1]).reshape(shape)
    columns = np.asarray(starts)[:, None, None] + inside
    columns.flags.writeable = False
    return columns


def _layer(name: str, pair: Mapping[str, tuple[int, ...]]) -> LayerSpec:
    for role in ("down", "up"):
        if role not in pair:
            raise LayoutError(f"layer `{name}` has no `{role}` matrix: the file is incomplete")
        if len(pair[role]) != 2:
            raise LayoutError(
                f"layer `{name}`: expected `{role}` to be a matrix, got shape {tuple(pair[role])}"
            )
    (rank, in_features), (out_features, up_rank) = pair["down"], pair["up"]
    if rank != up_rank:
        raise LayoutError(
            f"layer `{name}`: down has rank {rank} (shape {rank}x{in_features}) but up has rank "
            f"{up_rank} (shape {out_features}x{up_rank}); the two must agree"
        )
    return LayerSpec(name, in_features, out_features, rank)
