"""Which blocks of a U-Net adapters change, and so which outputs may be kept for all of them.

Of a block b with outputs a_c in C configurations of adapters, and their mean m, the relative
variance is

    RV_b = mean over images and steps of (1/C) sum_c ||a_c - m||^2 / ||m||^2,

and the relative change of configuration c is ``||a_c - a_none|| / ||a_none||``. Along trajectories
of their own, configurations differ in their latents too, and all blocks change with these; what the
adapters themselves do to a block shows at the same latents, those of the full stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.attribution.trajectory import Moment, record
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.report.grid import Cell, Grid


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much the outputs of blocks depend on adapters.

    Attributes:
        blocks: names, in the order in which they run.
        variance: RV_b ``[blocks]``, float64 like the others.
        change: relative change, mean over images and steps, one row per configuration.
        worst: the largest relative change of any configuration, image and step.
        forced: measured at the same latents, rather than along trajectories of their own.
    """

    blocks: tuple[str, ...]
    variance: Float[Tensor, " blocks"]
    change: Float[Tensor, "configurations blocks"]
    worst: Float[Tensor, " blocks"]
    forced: bool


@dataclass(frozen=True, eq=False)
class CacheReport:
    """Which outputs may be computed once, without adapters, and used for all configurations.

    Attributes:
        tolerance: largest relative change that counts as none.
        within: whether each block is within it.
        sensitivity: what was measured.
    """

    tolerance: float
    within: tuple[bool, ...]
    sensitivity: Sensitivity

    @property
    def safe(self) -> tuple[str, ...]:
        """The blocks up to the first one that is not within: what one may leave out whole."""
        first = self.within.index(False) if False in self.within else len(self.within)
        return self.sensitivity.blocks[:first]

    def grid(self) -> Grid:
        """The report as a table."""
        measured, safe = self.sensitivity, self.safe
        rows = zip(measured.blocks, measured.variance, measured.worst, self.within, strict=True)
        cells = tuple(
            (
                Cell(name),
                Cell("yes" if name in safe else "no, an earlier block changes" if ok else "no"),
                Cell(f"{100 * float(variance):.3g} %"),
                Cell(f"{100 * float(worst):.3g} %"),
            )
            for name, variance, worst, ok in rows
        )
        caption = (
            "Safe: no configuration changes the block's output, or that of an earlier block, by "
            f"more than {100 * self.tolerance:g} % of its norm without adapters, at the same "
            "latents."
        )
        return Grid(
            ("block", "safe to keep", "relative variance", "largest change"), cells, caption, 2
        )


def block_names(unet: nn.Module) -> tuple[str, ...]:
    """The blocks of a U-Net in the order in which they run.

    Raises:
        ConfigError: it is no U-Net as diffusers makes them.
    """
    parts = {name: getattr(unet, name, None) for name in ("conv_in", "down_blocks", "up_blocks")}
    if missing := [name for name, part in parts.items() if not isinstance(part, nn.Module)]:
        raise ConfigError(
            f"expected a U-Net with conv_in, down_blocks and up_blocks, {type(unet).__name__} has "
            f"no {missing[0]}; blocks of transformers are not measured"
        )
    down, up = (
        [f"{name}.{key}" for key, _ in parts[name].named_children()]  # type: ignore[union-attr]
        for name in ("down_blocks", "up_blocks")
    )
    # Some U-Nets have none.
    middle = ["mid_block"] * isinstance(getattr(unet, "mid_block", None), nn.Module)
    return ("conv_in", *down, *middle, *up)


def block_sensitivity(
    pipeline: Any,
    stack: AdapterStack,
    generations: Sequence[GenerationSpec],
    configurations: Any,
    *,
    forced: bool = True,
) -> Sensitivity:
    """Measure how block outputs depend on adapters, all configurations in one batch.

    Args:
        pipeline: the base; left as found.
        stack: the k adapters.
        generations: images that are averaged over.
        configurations: scales of adapters, a row ``[k]`` each.
        forced: all configurations see the latents of the full stack; otherwise each its own.

    Raises:
        ConfigError: no generations, a prompt is too long, the rows do not fit, or it is no U-Net.
        LayoutError: the adapters are of another base.
    """
    if not generations:
        raise ConfigError("generations: expected at least one, got none")
    blocks = block_names(pipeline.unet)
    rows = torch.as_tensor(configurations, dtype=torch.float32)
    if rows.ndim != 2 or rows.shape[1] != len(stack) or not len(rows):
        raise ConfigError(
            f"configurations: expected rows of {len(stack)} scales, one per adapter, got shape "
            f"{list(rows.shape)}"
        )
    # What has no adapters comes first: changes are measured from it.
    rows = torch.cat([torch.zeros(1, len(stack)), rows])

    def measure(moment: Moment) -> Tensor:
        return torch.stack([_of_block(moment.outputs[name]) for name in blocks], dim=1)

    found = torch.stack(
        [
            step
            for generation in generations
            for step in record(pipeline, stack, generation, rows, blocks, measure, forced=forced)
        ]
    )
    variance, change = found[:, 0], found[:, 1:]
    return Sensitivity(blocks, variance.mean(0), change.mean(0), change.amax(dim=(0, 1)), forced)


def relative_variance(outputs: Float[Tensor, "configurations ..."]) -> Float[Tensor, ""]:
    """``(1/C) sum_c ||a_c - m||^2 / ||m||^2``, float64; exactly 0 where all are the same.

    Example:
        >>> float(relative_variance(torch.tensor([[1.0, 0.0], [3.0, 0.0]])))
        0.25
    """
    flat = outputs.flatten(1).double()
    # A mean of the same numbers need not be that number; a mean of zeros is zero.
    apart = flat - flat[0]
    middle = apart.mean(dim=0)
    spread = (apart - middle).square().sum(dim=1).mean()
    return _ratio(spread, (flat[0] + middle).square().sum())


def relative_change(
    outputs: Float[Tensor, "configurations ..."], reference: Float[Tensor, "..."]
) -> Float[Tensor, " configurations"]:
    """``||a_c - a|| / ||a||``, float64."""
    apart = outputs.flatten(1).double() - reference.flatten().double()
    return _ratio(apart.norm(dim=1), reference.double().norm())


def cache_safe_blocks(sensitivity: Sensitivity, tolerance: float = 0.01) -> CacheReport:
    """Say which outputs may be computed once and kept for all configurations.

    Args:
        sensitivity: measured at the same latents.
        tolerance: the largest relative change of an output that counts as none.

    Raises:
        ConfigError: it was measured along trajectories of their own, or the tolerance is below 0.
    """
    if not sensitivity.forced:
        raise ConfigError(
            "sensitivity: expected one measured at the same latents, got one of trajectories that "
            "drift apart, in which every block changes; measure with forced=True"
        )
    if not tolerance >= 0:
        raise ConfigError(f"tolerance: expected 0 or more, got {tolerance}")
    within = tuple(bool(worst <= tolerance) for worst in sensitivity.worst)
    return CacheReport(tolerance, within, sensitivity)


def _of_block(outputs: Tensor) -> Float[Tensor, " numbers"]:
    """Relative variance of all but the first, and then their changes from the first."""
    change = relative_change(outputs[1:], outputs[0])
    return torch.cat([relative_variance(outputs[1:])[None], change])


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Of nothing to nothing: 0."""
    return torch.where(part == 0, torch.zeros_like(part), part / whole)
