"""Which symmetries a reader has, measured on random adapters beside what it claims."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.adapters.layout import Layout
from lora_ws.functional.perturb import scramble_gauge
from lora_ws.models.base import Metanetwork, Symmetry, is_invariant
from lora_ws.models.inputs import InputSpec
from lora_ws.models.module import MetanetModule

ADAPTERS, OUTPUTS = 8, 10
# Numbers of a layer, and of the changed layer, whose rank may be higher.
Move = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Change(NamedTuple):
    """A change of an adapter's factors.

    Attributes:
        name: what is done.
        symmetry: that a reader has which does not see it.
        move: makes the new B ``[n, outputs, rank]`` and A ``[n, rank, inputs]`` of every layer.
    """

    name: str
    symmetry: Symmetry
    move: Move


class Measured(NamedTuple):
    """What a change does to the outputs of a reader.

    Attributes:
        change: what was done.
        claimed: whether the reader says that it does not see it.
        moved: how far the outputs moved, over how far those of adapters lie apart; None where the
            reader cannot take the changed rank.
        bound: what rounding moves at most.
    """

    change: Change
    claimed: bool
    moved: float | None
    bound: float

    @property
    def unseen(self) -> bool:
        """Whether the reader does not see the change."""
        return self.moved is not None and self.moved <= self.bound


def changes() -> list[Change]:
    """Every change that is measured: splits of one update into factors, and other updates.

    Example:
        >>> [change.name for change in changes() if change.symmetry == "scale"]
        ['update times 3']
    """
    return [
        Change("B G, G⁻¹ A, G orthogonal", "gl", lambda b, a, rng: scramble_gauge(b, a, 1.0, rng)),
        Change("the same, condition 100", "gl", lambda b, a, rng: scramble_gauge(b, a, 100.0, rng)),
        Change("other order of ranks", "gl", lambda b, a, _: (b.flip(-1), a.flip(-2))),
        Change("10 B, A / 10", "gl", lambda b, a, _: (10 * b, a / 10)),
        Change(
            "rank padded with zeros to twice",
            "gl",
            lambda b, a, _: (_padded(b, -1), _padded(a, -2)),
        ),
        Change("rank split to twice, B R, R⁺ A", "gl", _widen),
        Change("signs of B's columns and A's rows", "sign", lambda b, a, _: _flip(b, a)),
        Change("update times 3", "scale", lambda b, a, _: (3 * b, a)),
        Change("update times −1", "negation", lambda b, a, _: (-b, a)),
    ]


def measure(
    model: Metanetwork, layout: Layout, featurizer: Any = None, seed: int = 0
) -> list[Measured]:
    """Measure by how much each change of factors moves the outputs of an untrained network.

    Random adapters and weights show a symmetry that holds for all; a trained network may come near
    to one that it has not.

    Args:
        model: the network.
        layout: of the adapters.
        featurizer: unfitted representation that the network reads; None gives it the rows.
        seed: of adapters, weights and changes.

    Returns:
        One entry per change. Distances are Frobenius norms over outputs of all adapters.

    Example:
        >>> from lora_ws.models import DeepSets
        >>> found = measure(DeepSets(width=8), Layout.known("tiny_sd_qv"))
        >>> [entry.change.symmetry for entry in found if entry.unseen != entry.claimed]
        []
    """
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(ADAPTERS, layout.size, generator=rng, dtype=torch.float64)
    reader = _Reader(model, featurizer, layout, rows, seed)
    plain = reader.outputs(rows, layout)
    assert plain is not None
    apart = (plain - plain.mean(0)).norm()
    found = []
    for change in changes():
        moved, wider = _moved(rows, layout, change.move, rng)
        outputs = reader.outputs(moved, wider)
        by = None if outputs is None else float((outputs - plain).norm() / apart)
        found.append(Measured(change, reader.claims(change.symmetry), by, reader.bound))
    return found


def faults(found: Sequence[Measured]) -> list[str]:
    """Say where claims and measurements differ, a line per symmetry; nothing where they agree.

    A symmetry holds where none of its changes is seen.

    Example:
        >>> from lora_ws.models import DeepSets
        >>> faults(measure(DeepSets(width=8), Layout.known("tiny_sd_qv")))
        []
    """
    said = []
    for symmetry in dict.fromkeys(entry.change.symmetry for entry in found):
        own = [entry for entry in found if entry.change.symmetry == symmetry]
        seen = [entry.change.name for entry in own if not entry.unseen]
        if own[0].claimed and seen:
            said.append(f"{symmetry}: claimed, but the outputs see: {'; '.join(seen)}")
        elif not own[0].claimed and not seen:
            said.append(f"{symmetry}: holds, but is not claimed; add it to `symmetries`")
    return said


class _Reader:
    """An untrained network, on rows or on features of them, at the rank of the rows or another."""

    def __init__(
        self, model: Metanetwork, featurizer: Any, layout: Layout, rows: Tensor, seed: int
    ) -> None:
        self.model, self.layout = model, layout
        self.featurizer = None if featurizer is None else featurizer.fit(_numbers(rows))
        torch.manual_seed(seed)
        first = self._features(rows)
        self.module = model.build(self._inputs(layout, first.shape[1]), OUTPUTS).double().eval()
        self.module.normalizer.fit(first.numpy(), np.arange(len(first)))
        self.module.double()

    @property
    def bound(self) -> float:
        """Half of the digits: changes of condition 100 cost a few."""
        return float(torch.finfo(torch.float32 if self.featurizer else torch.float64).eps ** 0.5)

    def claims(self, symmetry: Symmetry) -> bool:
        """Whether network or featurizer says that it has a symmetry."""
        inherited = symmetry in ("gl", "sign") and is_invariant(self.featurizer)
        return inherited or symmetry in self.model.symmetries

    @torch.no_grad()
    def outputs(self, rows: Tensor, layout: Layout) -> Tensor | None:
        """Outputs of rows; None where they have a rank that the reader cannot take."""
        if layout == self.layout:
            return self.module(self._features(rows))
        if self.featurizer is not None or self.model.reads != "factors":
            return None
        other = self.model.build(InputSpec.of(layout), OUTPUTS).double().eval()
        if not _same_shapes(other, self.module):
            return None
        other.load_state_dict(self.module.state_dict())
        return other(rows)

    def _features(self, rows: Tensor) -> Tensor:
        if self.featurizer is None:
            return rows
        return torch.from_numpy(np.asarray(self.featurizer.transform(_numbers(rows)), np.float64))

    def _inputs(self, layout: Layout, width: int) -> InputSpec:
        return InputSpec.of(layout) if self.model.reads == "factors" else InputSpec(width)


def _numbers(rows: Tensor) -> Float[np.ndarray, "adapters params"]:
    return rows.numpy().astype(np.float32)


def _same_shapes(one: MetanetModule, other: MetanetModule) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}


def _moved(rows: Tensor, layout: Layout, move: Move, rng: torch.Generator) -> tuple[Tensor, Layout]:
    """Every layer's factors changed, and the layout that they then have."""
    parts, layers = [], []
    for layer, down, up in layout.pairs():
        b, a = (
            rows[:, up].unflatten(1, layer.up_shape),
            rows[:, down].unflatten(1, layer.down_shape),
        )
        b, a = move(b, a, rng)
        parts += [a.flatten(1), b.flatten(1)]
        layers.append(replace(layer, rank=a.shape[1]))
    return torch.cat(parts, 1), Layout.from_layers(layers)


def _widen(b: Tensor, a: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    rank = a.shape[-2]
    wide = torch.randn(rank, 2 * rank, generator=rng, dtype=torch.float64)
    return b @ wide, torch.linalg.pinv(wide) @ a


def _padded(factor: Tensor, axis: int) -> Tensor:
    return torch.cat([factor, torch.zeros_like(factor)], axis)


def _flip(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Every second sign, the first one too."""
    signs = torch.ones(a.shape[-2], dtype=torch.float64)
    signs[::2] = -1
    return b * signs, a * signs[:, None]
