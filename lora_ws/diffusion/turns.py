"""`AdaptiveSwitch`: turns that end when the image has changed enough, not after so many steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import numpy as np
import torch

from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import Method, Mix, Step
from lora_ws.errors import ConfigError, check_range

MOST_TURNS = 1000


@final
@dataclass(frozen=True)
class AdaptiveSwitch(Method):
    """One adapter at a time, each until the image has changed by an equal share.

    Zhong et al. 2024 leave open whether the length of turns of `Switch` should adapt. Here the base
    draws the images once, how far latents move at each step is measured, and turns are cut so that
    they move equally far, on average over the images.

    Attributes:
        turns: turns of each adapter.
        change: how far latents move at each step of the base; None has it measured by `fitted`.

    Example:
        >>> late = AdaptiveSwitch(change=(1.0, 1.0, 2.0, 4.0))
        >>> [late.turn(Step(number, 4), 2) for number in range(4)]
        [0, 0, 0, 1]
    """

    alone: ClassVar[bool] = True
    turns: int = 1
    change: tuple[float, ...] | None = None

    def check(self, adapters: int) -> None:
        """See `Method.check`."""
        check_range("turns", self.turns, 1, MOST_TURNS)
        if self.change is not None and (min(self.change, default=-1) < 0 or not sum(self.change)):
            raise ConfigError(
                f"change: expected numbers of 0 and above, one per step, got {self.change}"
            )

    def fitted(
        self, pipeline: Any, generation: GenerationSpec, seeds: Sequence[int]
    ) -> "AdaptiveSwitch":
        """Measure how far latents move at each step of the base: root mean squares, mean of all."""
        if self.change is not None:
            return self
        # Here, because diffusers takes seconds to import.
        from lora_ws.diffusion.pipeline import initial_noise, size_of
        from lora_ws.diffusion.schedulers import begin_run, continue_run

        noise = initial_noise(pipeline, seeds, size_of(pipeline, generation))
        run = begin_run(pipeline, noise, generation, seeds=seeds)
        moved = [
            float((call.after - call.before).float().square().flatten(1).mean(dim=1).sqrt().mean())
            for call in continue_run(pipeline, run, generation)
        ]
        return replace(self, change=tuple(moved))

    def mix(self, step: Step, scales: Sequence[float]) -> Mix:
        """One mixture of the adapter whose turn it is."""
        row = torch.zeros(1, len(scales))
        turn = self.turn(step, len(scales))
        row[0, turn] = scales[turn]
        return Mix(row, torch.ones(1))

    def turn(self, step: Step, adapters: int) -> int:
        """Place of the adapter whose turn it is.

        Raises:
            ConfigError: the change is neither given nor measured.
        """
        if self.change is None:
            raise ConfigError("change: expected what `fitted` measures, got none")
        way = np.cumsum([0.0, *self.change])
        at = step.number / step.steps * len(self.change)
        share = np.interp(at, np.arange(len(way)), way) / way[-1]
        # Sums of shares that should be whole fall short by rounding.
        return int(share * self.turns * adapters + 1e-9) % adapters
