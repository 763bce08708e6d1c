"""How several adapters act together: which mixtures run at a step, and how predictions are joined.

Every method is a choice of ``Omega`` in ``eps(t) = sum_i Omega_i(t, region) * eps_i`` (Zhong et al.
2024, "Multi-LoRA composition for image generation"). Guidance is linear, so joining predictions
inside the denoiser gives their formulas with and without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.config import nearest
from lora_ws.errors import ConfigError


class Step(NamedTuple):
    """Where a denoiser is.

    Attributes:
        number: of the step, from 0.
        steps: how many there are.
        call: of the pipeline, from 0.
    """

    number: int
    steps: int
    call: int = 0


class Mix(NamedTuple):
    """Mixtures of k adapters that run side by side, and the weights of their predictions.

    Attributes:
        rows: scales, one row a mixture ``[m, k]``.
        weights: ``[m]``, or ``[m, height, width]`` at any resolution, which the latent's replaces.
    """

    rows: Float[Tensor, "m k"]
    weights: Float[Tensor, " m"] | Float[Tensor, "m height width"]


@dataclass(frozen=True)
class Method(ABC):
    """A way of composing adapters."""

    @abstractmethod
    def check(self, adapters: int) -> None:
        """Refuse what does not fit this number of adapters.

        Raises:
            ConfigError: it does not.
        """

    @abstractmethod
    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """What runs at a step.

        Args:
            step: where the denoiser is.
            scales: of the k adapters.
        """


@final
@dataclass(frozen=True)
class Merge(Method):
    """All adapters at once, ``W + sum_i scale_i dW_i``.

    Attributes:
        normalised: divide by their number, which keeps the update as long as those of single ones.
    """

    normalised: bool = False

    def check(self, adapters: int) -> None:
        """Any number will do."""

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """One mixture of all."""
        row = torch.tensor([scales]) / (len(scales) if self.normalised else 1)
        return Mix(row, torch.ones(1))


@final
@dataclass(frozen=True)
class Switch(Method):
    """One adapter at a time, each for some steps: ``i(t) = floor(((t - 1) mod k tau) / tau) + 1``.

    Attributes:
        tau: steps of an adapter before the next one's turn.
        weights: shares of the turns, one an adapter; None for equal ones. A round has ``k tau``
            steps, each of which goes to the adapter that is furthest behind its share.
        compat: as the released scripts, where the first turn is one step longer.
    """

    tau: int = 5
    weights: tuple[float, ...] | None = None
    compat: bool = False

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        if self.tau < 1:
            raise ConfigError(f"tau: expected at least 1 step, got {self.tau}")
        _check_weights(self.weights, adapters)

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """One mixture of the adapter whose turn it is."""
        row = torch.zeros(1, len(scales))
        turn = self.turn(step.number, len(scales))
        row[0, turn] = scales[turn]
        return Mix(row, torch.ones(1))

    def turn(self, step: int, adapters: int) -> int:
        """Whose turn it is at a step, counted from 0.

        Example:
            >>> [Switch(tau=2).turn(step, 3) for step in range(8)]
            [0, 0, 1, 1, 2, 2, 0, 0]
        """
        place = (max(step - 1, 0) if self.compat else step) % (adapters * self.tau)
        if self.weights is None:
            return place // self.tau
        total, turns = sum(self.weights), list[int]()
        for steps in range(1, place + 2):
            behind = [w / total * steps - turns.count(k) for k, w in enumerate(self.weights)]
            turns.append(behind.index(max(behind)))
        return turns[-1]


@final
@dataclass(frozen=True)
class Composite(Method):
    """Predictions with each adapter alone, averaged.

    Attributes:
        weights: of the predictions, one an adapter; None for equal ones. They are divided by their
            sum: otherwise the noise that is removed would be too much or too little.
        compat: as the released scripts, which compose at the first call of the pipeline alone and
            later use the last adapter.
    """

    weights: tuple[float, ...] | None = None
    compat: bool = False

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        _check_weights(self.weights, adapters)

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """A mixture an adapter."""
        rows = torch.tensor(scales).diag()
        if self.compat and step.call > 0:
            return Mix(rows[-1:], torch.ones(1))
        weights = torch.tensor(self.weights or (1.0,) * len(scales))
        return Mix(rows, weights / weights.sum())


@final
@dataclass(frozen=True, eq=False)
class Regions(Method):
    """Each adapter where its mask says so, and the base elsewhere.

    Attributes:
        masks: from 0 to 1, one an adapter, of any resolution ``[k, height, width]``. Where they
            sum to more than 1 they are divided by the sum.
    """

    masks: Float[Tensor, "k height width"]

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        masks = self.masks
        if (
            masks.ndim != 3
            or len(masks) != adapters
            or not bool(((masks >= 0) & (masks <= 1)).all())
        ):
            raise ConfigError(
                f"masks: expected numbers from 0 to 1 of shape [{adapters}, height, width], one "
                f"mask an adapter, got shape {list(masks.shape)}"
            )

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """A mixture an adapter, and the base."""
        rows = torch.cat([torch.tensor(scales).diag(), torch.zeros(1, len(scales))])
        masks = self.masks / self.masks.sum(0).clamp(min=1)
        return Mix(rows, torch.cat([masks, 1 - masks.sum(0, keepdim=True)]))


@final
@dataclass(frozen=True)
class Schedule(Method):
    """All adapters that are on at a step, merged.

    Attributes:
        windows: for each adapter from when to when it is on, as shares of the steps.

    Example:
        >>> Schedule(((0, 0.5), (0.5, 1))).mix(Step(0, 10), [1, 1]).rows.tolist()
        [[1.0, 0.0]]
    """

    windows: tuple[tuple[float, float], ...]

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        if len(self.windows) != adapters:
            raise ConfigError(
                f"windows: expected {adapters}, one an adapter, got {len(self.windows)}"
            )
        for start, stop in self.windows:
            if not 0 <= start < stop <= 1:
                raise ConfigError(f"windows: expected 0 <= start < stop <= 1, got {start}, {stop}")

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """One mixture of those that are on."""
        at = step.number / step.steps
        on = torch.tensor([float(start <= at < stop) for start, stop in self.windows])
        return Mix((torch.tensor(scales) * on)[None], torch.ones(1))


METHODS: dict[str, Method] = {
    "merge": Merge(),
    "merge-normalised": Merge(normalised=True),
    "switch": Switch(),
    "composite": Composite(),
}
MethodName = Literal["merge", "merge-normalised", "switch", "composite"]


def method_named(name: str) -> Method:
    """A method with its published settings.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"method: there is no `{name}`{nearest(name, list(METHODS))}")
    return METHODS[name]


def _check_weights(weights: tuple[float, ...] | None, adapters: int) -> None:
    if weights is None:
        return
    if len(weights) != adapters or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(
            f"weights: expected {adapters} numbers, one an adapter, none below 0 and one above, "
            f"got {weights}"
        )
