"""How far a cheap attribution agrees with true ablation, and what starting late saves and loses."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from lora_ws.attribution.ablation import Ablation, ablate
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.schedulers import timesteps_for
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

STARTS = (0.0, 0.1, 0.25, 0.5, 0.75)


@runtime_checkable
class Attribution(Protocol):
    """Shares and maps of the adapters of an image by some method, such as an `Ablation`."""

    @property
    def maps(self) -> Float[Tensor, "k height width"] | None:
        """Where each of k adapters acted; None for methods that do not say."""
        ...

    @property
    def shares(self) -> Float[Tensor, " k"]:
        """How much of the image is each adapter's."""
        ...


class Agreement(NamedTuple):
    """Agreement of two methods, averaged over images.

    Attributes:
        top1: share of images that both attribute to the same adapter; see `majority`.
        map_correlation: Pearson's over pixels, of the maps of each adapter.
        share_correlation: Pearson's over the adapters of an image, of their shares.
        pictures: how many.
        majority: the ``top1`` of always choosing the adapter that is first most often.

    Means leave out what does not vary; nan where nothing does.
    """

    top1: float
    map_correlation: float
    share_correlation: float
    pictures: int
    majority: float


class LateStart(NamedTuple):
    """Ablation that leaves adapters out from some step on, against true ablation.

    Attributes:
        start: share of the steps before it.
        cost: calls of the model for an image, over those of true ablation.
        agreement: with true ablation.
    """

    start: float
    cost: float
    agreement: Agreement


def agreement(cheap: Sequence[Attribution], true: Sequence[Attribution]) -> Agreement:
    """Compare a method with another on the same images.

    Args:
        cheap: attributions by the one, one per image.
        true: by the other, of the same images and adapters.

    Raises:
        ConfigError: not as many of both, none, or of other numbers of adapters or pixels.
    """
    if len(cheap) != len(true) or not true:
        raise ConfigError(
            f"expected attributions of the same images, got {len(cheap)} and {len(true)}"
        )
    same, firsts, maps, shares = [], [], [], []
    for one, other in zip(cheap, true, strict=True):
        first, second = _array(one.shares), _array(other.shares)
        if first.shape != second.shape:
            raise ConfigError(
                f"expected shares of the same adapters, got {len(first)} and {len(second)}"
            )
        firsts.append(second.argmax())
        same.append(first.argmax() == firsts[-1])
        shares.append(_correlation(first, second))
        maps += _map_correlations(one.maps, other.maps)
    majority = float(np.bincount(firsts).max()) / len(true)
    return Agreement(float(np.mean(same)), _mean(maps), _mean(shares), len(true), majority)


def late_start_curve(
    pipeline: Any,
    stack: AdapterStack,
    generations: Sequence[GenerationSpec],
    starts: Sequence[float] = STARTS,
    *,
    true: Sequence[Ablation] | None = None,
    batch: int = 16,
) -> list[LateStart]:
    """Measure what leaving adapters out from a later step on saves, and how well it agrees.

    Args:
        pipeline: the base; left as found.
        stack: the adapters.
        generations: images that are averaged over.
        starts: shares of the steps that are done with all adapters, from 0 to below 1.
        true: ablations of the same generations, where there are some already.
        batch: images at once.

    Raises:
        ConfigError: no generations, a start that is no such share, or a prompt is too long.
        LayoutError: the adapters are of another base.
    """
    if not generations:
        raise ConfigError("generations: expected at least one, got none")
    if wrong := [start for start in starts if not 0 <= start < 1]:
        raise ConfigError(f"starts: expected shares from 0 to below 1, got {wrong[0]}")
    true = true or [ablate(pipeline, stack, generation, batch=batch) for generation in generations]
    counts = [len(timesteps_for(pipeline, each)) for each in generations]
    rows = []
    for start in starts:
        steps = [min(round(start * n), n - 1) for n in counts]
        late = [
            ablate(pipeline, stack, generation, start=step, batch=batch) if step else whole
            for generation, step, whole in zip(generations, steps, true, strict=True)
        ]
        # With all adapters, with none, and without each: all but one are saved until the start.
        pictures = len(stack) + 2
        done = [step / n for step, n in zip(steps, counts, strict=True)]
        costs = [1 - share * (pictures - 1) / pictures for share in done]
        rows.append(LateStart(_mean(done), _mean(costs), agreement(late, true)))
    return rows


def _map_correlations(one: Tensor | None, other: Tensor | None) -> list[float]:
    if one is None or other is None:
        return []
    if one.shape != other.shape:
        raise ConfigError(
            f"expected maps of the same pixels, got {list(one.shape)} and {list(other.shape)}"
        )
    pairs = zip(_array(one), _array(other), strict=True)
    return [_correlation(first.ravel(), second.ravel()) for first, second in pairs]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; nan where one of them does not vary."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
