"""How several adapters act together: which mixtures run at a step, and how predictions are joined.

Every method is a choice of ``Omega`` in ``eps(t) = sum_i Omega_i(t, region) * eps_i`` (Zhong et al.
2024, "Multi-LoRA composition for image generation"). Guidance is linear, so joining predictions
inside the denoiser gives their formulas with and without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.errors import ConfigError

# What a prompt says of an adapter: by what it lacks without its trigger, or by how near that is.
By = Literal["absence", "presence"]


class Step(NamedTuple):
    """Where a denoiser is.

    Attributes:
        number: of the step, from 0; a step is a timestep of the scheduler, which calls the model.
        steps: how many are done.
        call: of the pipeline, from 0.
    """

    number: int
    steps: int
    call: int = 0


class Mix(NamedTuple):
    """Mixtures of k adapters that run side by side, and the weights of their predictions.

    Attributes:
        rows: scales, one row per mixture ``[m, k]``, or one for each of s samples ``[m, s, k]``, of
            which a batch is a multiple.
        weights: ``[m]``, or ``[m, height, width]`` at any resolution, which the latent's replaces.
    """

    rows: Float[Tensor, "m k"] | Float[Tensor, "m s k"]
    weights: Float[Tensor, " m"] | Float[Tensor, "m height width"]


class Method(ABC):
    """A way of composing adapters; subclasses are frozen dataclasses, named by their class path.

    Attributes:
        alone: every mixture is of one adapter, or of none.
        weighed_by: what weights from a prompt mean for the field ``weights``; see
            `lora_ws.diffusion.text_encoders.prompt_weights`. None where there is no such field.
    """

    alone: ClassVar[bool] = False
    weighed_by: ClassVar[By | None] = None

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

    def fitted(self, pipeline: Any, generation: GenerationSpec, seeds: Sequence[int]) -> "Method":
        """The same method with what it measures of a generation before it runs; most need nothing.

        Args:
            pipeline: the base, without adapters; left as found.
            generation: what will be drawn.
            seeds: of its images, one each.
        """
        return self

    def weighed(self, weights: tuple[float, ...]) -> "Method":
        """The same method with other weights of the adapters.

        Raises:
            ConfigError: it has none.
        """
        if self.weighed_by is None:
            raise ConfigError(f"weights: expected a method such as Switch or Composite, got {self}")
        return replace(self, weights=weights)  # type: ignore[type-var, call-arg]

    def __str__(self) -> str:
        """Class name and those options of one value that are not defaults: ``Switch(tau=10)``."""
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        single = [(n, v) for n, v, d in given if isinstance(v, int | float | str) and v != d]
        options = ", ".join(f"{name}={value}" for name, value in single)
        return type(self).__name__ + (f"({options})" if options else "")


@final
@dataclass(frozen=True)
class Merge(Method):
    """All adapters at once, ``W + sum_i scale_i dW_i``.

    Attributes:
        normalised: divide by the number of adapters, so that the update has the norm of a single
            one.

    Example:
        >>> Merge().mix(Step(0, 20), [0.8, 1.0]).rows
        tensor([[0.8000, 1.0000]])
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
        tau: steps per turn.
        weights: shares of the turns, one per adapter; None for equal ones. A round has ``k tau``
            steps, each of which goes to the adapter that is furthest behind its share.
        compat: as the released scripts, where the first turn is one step longer.

    Example:
        >>> Switch(tau=1).mix(Step(3, 20), [0.8, 1.0]).rows
        tensor([[0., 1.]])
    """

    alone: ClassVar[bool] = True
    weighed_by: ClassVar[By | None] = "absence"
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
        weights: of the predictions, one per adapter; None for equal ones. They are divided by their
            sum: otherwise the noise that is removed would be too much or too little.
        compat: as the released scripts, which compose at the first call of the pipeline alone and
            later use the last adapter.

    Example:
        >>> Composite().mix(Step(0, 20), [0.8, 1.0]).weights
        tensor([0.5000, 0.5000])
    """

    alone: ClassVar[bool] = True
    weighed_by: ClassVar[By | None] = "presence"
    weights: tuple[float, ...] | None = None
    compat: bool = False

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        _check_weights(self.weights, adapters)

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """One mixture per adapter."""
        rows = torch.tensor(scales).diag()
        if self.compat and step.call > 0:
            return Mix(rows[-1:], torch.ones(1))
        weights = torch.tensor(self.weights or (1.0,) * len(scales))
        return Mix(rows, weights / weights.sum())


@final
@dataclass(frozen=True, eq=False)
class Regions(Method):
    """Each adapter inside its mask, and the base elsewhere.

    Attributes:
        masks: from 0 to 1, one per adapter, of any resolution ``[k, height, width]``; or images
            of one size, grey, where white is 1. Where masks sum to more than 1 they are divided by
            the sum.

    Example:
        >>> halves = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # left, right
        >>> Regions(halves).mix(Step(0, 20), [0.8, 1.0]).rows
        tensor([[0.8000, 0.0000],
                [0.0000, 1.0000],
                [0.0000, 0.0000]])
    """

    alone: ClassVar[bool] = True
    masks: Float[Tensor, "k height width"] | tuple[Path, ...]

    @cached_property
    def values(self) -> Float[Tensor, "k height width"]:
        """The masks as numbers.

        Raises:
            ConfigError: a file is no image, or they differ in size.
        """
        return self.masks if isinstance(self.masks, Tensor) else _read_masks(self.masks)

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        masks = self.values
        if (
            masks.ndim != 3
            or len(masks) != adapters
            or not bool(((masks >= 0) & (masks <= 1)).all())
        ):
            raise ConfigError(
                f"masks: expected numbers from 0 to 1 of shape [{adapters}, height, width], one "
                f"mask per adapter, got shape {list(masks.shape)}"
            )

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """One mixture per adapter, and the base."""
        rows = torch.cat([torch.tensor(scales).diag(), torch.zeros(1, len(scales))])
        masks = self.values / self.values.sum(0).clamp(min=1)
        return Mix(rows, torch.cat([masks, 1 - masks.sum(0, keepdim=True)]))


@final
@dataclass(frozen=True)
class Schedule(Method):
    """The active adapters of a step, merged.

    Attributes:
        windows: per adapter, the first and last share of the steps in which it is active.

    Example:
        >>> Schedule(((0, 0.5), (0.5, 1))).mix(Step(0, 10), [1, 1]).rows.tolist()
        [[1.0, 0.0]]
    """

    windows: tuple[tuple[float, float], ...]

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        if len(self.windows) != adapters:
            raise ConfigError(
                f"windows: expected {adapters}, one per adapter, got {len(self.windows)}"
            )
        for start, stop in self.windows:
            if not 0 <= start < stop <= 1:
                raise ConfigError(f"windows: expected 0 <= start < stop <= 1, got {start}, {stop}")

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """One mixture of those that are on."""
        at = step.number / step.steps
        on = torch.tensor([float(start <= at < stop) for start, stop in self.windows])
        return Mix((torch.tensor(scales) * on)[None], torch.ones(1))


@final
@dataclass(frozen=True)
class BatchedSets(Method):
    """Several sets of the adapters at once, each composed by the same method.

    Sample j of a batch is drawn with set ``j`` modulo the number of sets.

    Attributes:
        method: of every set; one that weighs predictions alike everywhere.
        sets: places of adapters, in the order of their turns; all of one size.
    """

    method: Method
    sets: tuple[tuple[int, ...], ...]

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        sizes = {len(places) for places in self.sets}
        if len(sizes) != 1 or not {k for s in self.sets for k in s} <= set(range(adapters)):
            raise ConfigError(
                f"sets: expected sets of one size of places from 0 to {adapters - 1}, got "
                f"{self.sets}"
            )
        self.method.check(*sizes)

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """The mixtures of each set."""
        mixes = [self.method.mix(step, [scales[k] for k in places]) for places in self.sets]
        rows = torch.zeros(len(mixes[0].rows), len(self.sets), len(scales))
        for n, (places, mix) in enumerate(zip(self.sets, mixes, strict=True)):
            rows[:, n, list(places)] = mix.rows
        return Mix(rows, mixes[0].weights)


def acts_at(method: Method, adapters: int, steps: int) -> list[list[int]]:
    """The steps, counted from 0, at which each adapter has a part in the prediction.

    Example:
        >>> acts_at(Switch(tau=2), 3, 5)
        [[0, 1], [2, 3], [4]]
    """
    mixes = [method.mix(Step(number, steps), [1.0] * adapters) for number in range(steps)]
    on = [mix.rows.flatten(0, -2).any(dim=0).tolist() for mix in mixes]
    return [[step for step, row in enumerate(on) if row[k]] for k in range(adapters)]


def _read_masks(files: Sequence[Path]) -> Float[Tensor, "k height width"]:
    from PIL import Image

    masks = []
    for file in files:
        try:
            with Image.open(file) as picture:
                masks.append(torch.from_numpy(np.array(picture.convert("L"), np.float32) / 255))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"masks: expected an image, got `{file}` ({error})") from error
    if len(sizes := {tuple(mask.shape) for mask in masks}) != 1:
        raise ConfigError(f"masks: expected images of one size, got {sorted(sizes)}")
    return torch.stack(masks)


def _check_weights(weights: tuple[float, ...] | None, adapters: int) -> None:
    if weights is None:
        return
    if len(weights) != adapters or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(
            f"weights: expected {adapters} numbers, one per adapter, none below 0 and one above, "
            f"got {weights}"
        )
