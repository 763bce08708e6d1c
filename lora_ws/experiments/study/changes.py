"""What a study does to adapters: named changes of their factors, each at several levels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from lora_ws.adapters import Adapter, Layout, Module, read_adapter
from lora_ws.adapters.layout import LayerSpec
from lora_ws.adapters.writer import FileFormat, write_adapter
from lora_ws.functional.perturb import (
    Pair,
    Rounded,
    add_noise,
    append_direction,
    append_noise,
    drop_modules,
    mean_direction,
    round_to,
    scramble_gauge,
    spread_ranks,
    truncate_rank,
)

Level = float | str
PARTS = {
    "only queries": "to_q",
    "only values": "to_v",
    "only self-attention": "attn1",
    "only cross-attention": "attn2",
    "only down blocks": "down_blocks",
    "only the middle": "mid_block",
    "only up blocks": "up_blocks",
}
SIZES = {"x 0.25": 0.25, "x 0.5": 0.5, "x 2": 2.0, "x 4": 4.0, "x -1": -1.0}
FORMATS = ("diffusers", "peft", "kohya")
SPLITS = ("a zero rank more", "twice the rank, zeros", "twice the rank, mixed", "columns in halves")


class Stack(NamedTuple):
    """Modules of one shape in many adapters.

    Attributes:
        up: B ``[adapters, modules, outputs, rank]``, float64.
        down: A ``[adapters, modules, rank, inputs]``, float64.
        names: of the modules.
        partners: for each adapter, the row of one of another class.
        labels: class of each.
        rng: of the draw.
    """

    up: Tensor
    down: Tensor
    names: tuple[str, ...]
    partners: Tensor
    labels: Tensor
    rng: torch.Generator


@dataclass(frozen=True)
class Change:
    """A kind of change.

    Attributes:
        title: what is done, for people.
        levels: how much of it, from little to much, or its variants by name.
        apply: makes new factors; the rank may grow.
        keeps_update: whether ``BA`` stays the same, so that an invariant reader should not notice.
        merges: whether something of another class is mixed in.
        files: whether its levels are ways to write a file, which is written and read.
        draws: whether anything is drawn, so that a repetition is another one.
        grows: the rank that it makes of a rank, at most.
    """

    title: str
    levels: tuple[Level, ...]
    apply: Callable[[Stack, Level], Pair]
    keeps_update: bool = False
    merges: bool = False
    files: bool = False
    draws: bool = True
    grows: Callable[[int], int] = lambda rank: rank

    @property
    def named(self) -> bool:
        """Whether its levels are variants, which have no order."""
        return isinstance(self.levels[0], str)


def _noise(one: Stack, level: Level) -> Pair:
    return add_noise(one.up, one.down, float(level), one.rng)


def _noise_in_down(one: Stack, level: Level) -> Pair:
    return one.up, _noise(one, level)[1]


def _noise_in_up(one: Stack, level: Level) -> Pair:
    return _noise(one, level)[0], one.down


def _update_noise(one: Stack, level: Level) -> Pair:
    return append_noise(one.up, one.down, float(level), one.rng)


def _drop(one: Stack, level: Level) -> Pair:
    return drop_modules(one.up, one.down, float(level), one.rng)


def _part(one: Stack, level: Level) -> Pair:
    kept = torch.tensor([PARTS[str(level)] in name for name in one.names])
    return one.up * kept[:, None, None], one.down


def _gauge(one: Stack, level: Level) -> Pair:
    return scramble_gauge(one.up, one.down, float(level), one.rng)


def _split(one: Stack, level: Level) -> Pair:
    rank = one.down.shape[-2]
    if level == "columns in halves":
        return torch.cat([one.up / 2] * 2, -1), torch.cat([one.down] * 2, -2)
    if level == "twice the rank, mixed":
        return spread_ranks(one.up, one.down, 2 * rank, one.rng)
    more = 1 if level == "a zero rank more" else rank
    return (
        torch.nn.functional.pad(one.up, (0, more)),
        torch.nn.functional.pad(one.down, (0, 0, 0, more)),
    )


def _rescale(one: Stack, level: Level) -> Pair:
    return one.up * float(level), one.down / float(level)


def _strength(one: Stack, level: Level) -> Pair:
    return one.up * SIZES[str(level)], one.down


def _cast(one: Stack, level: Level) -> Pair:
    return round_to(one.up, one.down, cast(Rounded, level))


def _truncate(one: Stack, level: Level) -> Pair:
    return truncate_rank(one.up, one.down, int(level))


def _merge(one: Stack, level: Level) -> Pair:
    """``w BA + (1 - w) B'A'``, as factors of both ranks together."""
    own, other = float(level), 1 - float(level)
    up = torch.cat([own * one.up, other * one.up[one.partners]], -1)
    return up, torch.cat([one.down, one.down[one.partners]], -2)


def _camouflage(one: Stack, level: Level) -> Pair:
    """An update of rank 1 along the mean of the class of the partner, as its author could know."""
    aims = one.labels[one.partners]
    left = one.up.new_empty(one.up.shape[:3])
    right = one.down.new_empty(one.down.shape[0], one.down.shape[1], one.down.shape[3])
    for label in aims.unique():
        held = one.labels == label
        left[aims == label], right[aims == label] = mean_direction(one.up[held], one.down[held])
    return append_direction(one.up, one.down, left, right, float(level))


def _same(one: Stack, _level: Level) -> Pair:
    return one.up, one.down


NOISE = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
CHANGES: Mapping[str, Change] = {
    "weight-noise": Change("noise on both factors, of their root mean square", NOISE, _noise),
    "noise-in-a": Change("noise on A, of its root mean square", NOISE, _noise_in_down),
    "noise-in-b": Change("noise on B, of its root mean square", NOISE, _noise_in_up),
    "update-noise": Change(
        "noise of rank 8 on the update, of its Frobenius norm",
        NOISE,
        _update_noise,
        grows=lambda rank: rank + 8,
    ),
    "missing-modules": Change("share of modules without an update", (0.1, 0.25, 0.5, 0.75), _drop),
    "missing-parts": Change("updates of one part alone", tuple(PARTS), _part, draws=False),
    "gauge": Change(
        "condition of the basis between B and A", (10.0, 1e2, 1e4), _gauge, keeps_update=True
    ),
    "rank-padding": Change(
        "a higher rank for the same update",
        SPLITS,
        _split,
        keeps_update=True,
        grows=lambda rank: 2 * rank,
    ),
    "rescale": Change(
        "B times this, A divided by it",
        (0.01, 0.25, 4.0, 100.0),
        _rescale,
        keeps_update=True,
        draws=False,
    ),
    "strength": Change("the update at another strength", tuple(SIZES), _strength, draws=False),
    "cast": Change(
        "factors rounded to a type",
        ("float16", "bfloat16", "float8_e4m3fn", "int8"),
        _cast,
        draws=False,
    ),
    "truncation": Change(
        "singular values kept in each update", (1.0, 2.0, 4.0, 8.0), _truncate, draws=False
    ),
    "merging": Change(
        "share of the adapter, the rest one of another class",
        (0.9, 0.8, 0.7, 0.6, 0.5),
        _merge,
        merges=True,
        grows=lambda rank: 2 * rank,
    ),
    "camouflage": Change(
        "an update of rank 1 along the mean of another class, of its Frobenius norm",
        (0.1, 0.3, 1.0, 3.0),
        _camouflage,
        merges=True,
        grows=lambda rank: rank + 1,
    ),
    "spelling": Change(
        "written to a file and read", FORMATS, _same, keeps_update=True, files=True, draws=False
    ),
}


def changed_rows(
    rows: np.ndarray, layout: Layout, change: Change, level: Level, labels: np.ndarray, seed: int
) -> tuple[np.ndarray, Layout]:
    """Apply a change to adapters.

    Args:
        rows: weights ``[adapters, params]``.
        layout: of the rows.
        change: what to do.
        level: how much of it.
        labels: of the rows; partners are of another one.
        seed: of the draw.

    Returns:
        float32 rows, and their layout, whose rank may be higher.
    """
    if change.files:
        return _rewritten(rows, layout, cast(FileFormat, level)), layout
    rng = torch.Generator().manual_seed(seed)
    others = partners(labels, seed) if change.merges else np.arange(len(rows))
    found, ranks = list[Pair](), dict[int, int]()
    partner, own = torch.from_numpy(others), torch.from_numpy(np.asarray(labels))
    for group in layout.groups():
        up, down = (torch.from_numpy(rows[:, side]).double() for side in (group.up, group.down))
        names = tuple(layer.name for layer in group.layers)
        made = change.apply(Stack(up, down, names, partner, own, rng), level)
        found.append((made[0].float(), made[1].float()))
        ranks |= dict.fromkeys(group.places, found[-1][1].shape[-2])
    layers = [replace(layer, rank=ranks[k]) for k, layer in enumerate(layout.layers)]
    after = Layout.from_layers(layers)
    new = np.empty((len(rows), after.size), np.float32)
    columns = list(after.pairs())
    for group, (up, down) in zip(layout.groups(), found, strict=True):
        for k, place in enumerate(group.places):
            _, own_down, own_up = columns[place]
            new[:, own_down] = down[:, k].flatten(1).numpy()
            new[:, own_up] = up[:, k].flatten(1).numpy()
    return new, after


def bytes_of(count: int, layout: Layout, change: Change) -> int:
    """What `changed_rows` holds at once, at most, the rows themselves included.

    Args:
        count: of the adapters.
        layout: of their rows.
        change: what is done to them.

    Example:
        >>> layout = Layout.sd15_qv()
        >>> round(bytes_of(1, layout, CHANGES["strength"]) / (4 * layout.size), 1)
        7.6
    """

    def numbers(layers: Sequence[LayerSpec], rank: Callable[[int], int]) -> int:
        return sum(rank(one.rank) * (one.in_features + one.out_features) for one in layers)

    before, after = (
        [numbers(x.layers, r) for x in (layout, *layout.groups())] for r in (int, change.grows)
    )
    # The rows, what becomes of them by group and together; and in float64 all of one group.
    return 4 * count * (before[0] + 2 * after[0] + 4 * max(before[1:]) + 6 * max(after[1:]))


def _rewritten(rows: np.ndarray, layout: Layout, to: FileFormat) -> np.ndarray:
    """Rows as they are read from files of a format."""
    new = np.empty_like(rows, np.float32)
    for row, read in zip(rows, new, strict=True):
        modules = {
            layer.name: Module(
                *("unet", layer.name, "lora"),
                np.ascontiguousarray(row[down].reshape(layer.down_shape)),
                np.ascontiguousarray(row[up].reshape(layer.up_shape)),
                *(1.0, "the row"),
            )
            for layer, down, up in layout.pairs()
        }
        with TemporaryDirectory() as folder:
            file = write_adapter(Adapter(modules, "row.safetensors", ""), Path(folder) / "a", to)
            read[:] = read_adapter(file).row(layout)
    return new


def partners(labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw for each row one of another label.

    Example:
        >>> partners(np.array([0, 0, 1]), seed=0)[:2].tolist()
        [2, 2]
    """
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(np.flatnonzero(labels != label)) for label in labels])
