"""Several adapters merged into one, by their updates and not by their factors.

Merging factors, as peft's ``linear`` and ``ties`` do, mixes B of one adapter with A of another: the
result is no merge of what the adapters do. Here ``sum_i scale_i B_i A_i`` is exact, and what keeps
some entries of updates alone (TIES, DARE) is done on the update of one module at a time. A
convolution is a linear map of the patches that its kernel sees, so it merges as its flat matrix.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.errors import AdapterError, ConfigError
from lora_ws.functional.factors import Cut, cut_to_rank
from lora_ws.functional.sketch import update_norm

How = Literal["linear", "ties", "dare"]


class Merged(NamedTuple):
    """A merged adapter.

    Attributes:
        adapter: as if read from a file.
        energy: share of the merged update's squared norm that its rank holds.
    """

    adapter: Adapter
    energy: float


def merge_adapters(
    adapters: Sequence[Adapter],
    scales: Sequence[float],
    how: How = "linear",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Merged:
    """Merge adapters of one base.

    Args:
        adapters: with linear modules and convolutions, of denoisers and text encoders.
        scales: one per adapter, beside what its file asks for.
        how: ``linear`` adds updates; ``ties`` keeps the largest entries of each, elects a sign for
            each entry and averages those that agree (Yadav et al. 2023); ``dare`` drops entries at
            random, rescales the others and adds (Yu et al. 2024). The last two hold one module's
            updates at a time, ``(k + 1) * outputs * inputs`` numbers.
        rank: of the result; None keeps the sum of the ranks, which ``linear`` needs and no more.
        density: share of entries that ``ties`` and ``dare`` keep.
        seed: of what ``dare`` drops.

    Raises:
        ConfigError: the numbers do not fit.
        AdapterError: a module is of DoRA, or of different widths or kernels.
    """
    if not adapters or len(scales) != len(adapters):
        raise ConfigError(f"scales: expected {len(adapters)}, one per adapter, got {len(scales)}")
    if not 0 < density <= 1 or (rank is not None and rank < 1):
        raise ConfigError(f"expected 0 < density <= 1 and rank >= 1, got {density} and {rank}")
    rng = np.random.default_rng(seed)
    modules: dict[str, Module] = {}
    kept = whole = 0.0
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        held = [
            (a, a.modules[name], s)
            for a, s in zip(adapters, scales, strict=True)
            if name in a.modules
        ]
        _check(held)
        down = np.concatenate([m.down for _, m, _ in held]).astype(np.float64)
        up = np.concatenate([m.up * np.float64(m.scale * s) for _, m, s in held], axis=1)
        most = len(down) if rank is None else rank
        if how == "linear":
            cut = _uncut(down, up) if most >= len(down) else cut_to_rank(down, up, most)
        else:
            updates = np.stack([np.float64(m.scale * s) * m.up @ m.down for _, m, s in held])
            update = ties(updates, density) if how == "ties" else dare(updates, density, rng)
            cut = cut_to_rank(update, np.eye(len(update)), min(most, *update.shape))
        kept, whole = kept + cut.kept, whole + cut.whole
        first = held[0][1]
        factors = (cut.down.astype(np.float32), cut.up.astype(np.float32))
        # Some files write a kernel of 1x1 as a matrix.
        kernel = max((m.kernel for _, m, _ in held), key=len)
        modules[name] = Module(
            first.component, first.path, "lora", *factors, 1.0, f"merged: {how}", kernel
        )
    source = f"merged-{how}.safetensors"
    return Merged(Adapter(modules, source, ""), kept / whole if whole else 1.0)


def _uncut(down: np.ndarray, up: np.ndarray) -> Cut:
    energy = update_norm([("", down, up, 1.0)]) ** 2
    return Cut(down, up, energy, energy)


def ties(
    updates: Float[np.ndarray, "k outputs inputs"], density: float
) -> Float[np.ndarray, "outputs inputs"]:
    """Keep the largest entries of each update, elect a sign, average those that have it.

    Args:
        updates: scaled already.
        density: share of entries of each that is kept.

    Example:
        >>> ties(np.array([[[3.0, 1.0]], [[-1.0, 2.0]]]), 1.0).tolist()
        [[3.0, 1.5]]
    """
    flat = updates.reshape(len(updates), -1)
    count = int(density * flat.shape[1])
    trimmed = np.zeros_like(flat)
    if count:
        largest = np.argpartition(-np.abs(flat), count - 1, axis=1)[:, :count]
        np.put_along_axis(trimmed, largest, np.take_along_axis(flat, largest, 1), 1)
    sign = np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(trimmed) == sign
    merged = (trimmed * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return merged.reshape(updates.shape[1:])


def dare(
    updates: Float[np.ndarray, "k outputs inputs"], density: float, rng: np.random.Generator
) -> Float[np.ndarray, "outputs inputs"]:
    """Drop entries at random, divide the others by the share that is kept, and add.

    Args:
        updates: scaled already.
        density: share of entries that is kept.
        rng: decides which.
    """
    return (updates * (rng.random(updates.shape) < density)).sum(axis=0) / density


def _check(held: Sequence[tuple[Adapter, Module, float]]) -> None:
    for adapter, module, _ in held:
        if module.needs_base:
            raise AdapterError(
                f"{adapter.source}: `{module.name}` is of DoRA; expected plain factors to merge",
                "needs-base",
            )
    shapes = {(m.outputs, m.inputs, m.kernel if prod(m.kernel) > 1 else ()) for _, m, _ in held}
    if len(shapes) > 1:
        raise AdapterError(
            f"{held[-1][0].source}: `{held[0][1].name}` has other widths or another kernel than in "
            f"{held[0][0].source}; expected adapters of one base",
            "foreign",
        )
