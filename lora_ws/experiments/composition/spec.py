"""What the file of the experiment on composition holds, and what the experiment keeps."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from lora_ws.composition.testbed import SIZES
from lora_ws.diffusion.methods import Composite, Merge, Method, Switch
from lora_ws.diffusion.turns import AdaptiveSwitch
from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.quoted import PublishedTable

NONE, MERGE, SWITCH, COMPOSITE = "no adapter", "merge", "switch", "composite"
ADAPTIVE = "adaptive switch"
# Method and what its scales are multiplied by; the paper's own runs have all at 0.8.
METHODS: dict[str, tuple[Method, float]] = {
    NONE: (Merge(), 0.0),
    MERGE: (Merge(), 1.0),
    "merge at 0.8": (Merge(), 0.8),
    "merge-normalised": (Merge(normalised=True), 1.0),
    SWITCH: (Switch(), 1.0),
    ADAPTIVE: (AdaptiveSwitch(), 1.0),
    COMPOSITE: (Composite(), 1.0),
}
Names = tuple[str, ...]
# Of sets: with a character, which the prompt does not name; without one, where the prompt names the
# digit; and with a character and both styles, where a set of the paper has one style at most.
Kind = Literal["character", "named", "styles"]


class Key(NamedTuple):
    """Tells records apart.

    Attributes:
        method: one of `METHODS`, or a `turns_named`.
        size: adapters per set.
        kind: of the sets.
    """

    method: str
    size: int
    kind: Kind


@dataclass(frozen=True)
class CompositionSpec(EvalSpec):
    """An experiment on the bundled testbed.

    Attributes:
        base: of the adapters.
        prompt: of sets with a character; it names no digit.
        named: of sets without one; `{}` stands for a digit.
        steps: of denoising.
        guidance: its scale.
        images: of every set and method.
        digits: images of every set without a character, each of another digit.
        both_sizes: of the sets with both styles.
        both_images: of every such set and method.
        taus: turns of Switch that are compared.
        adaptive: turns of each adapter of AdaptiveSwitch that are compared.
        tau_size: adapters of the sets that both are compared on.
        cost_images: drawn at once where costs are measured.
        published: numbers of others.
        sizes: of the sets.
    """

    base: str
    prompt: str
    named: str
    steps: int
    guidance: float
    images: int
    digits: int
    both_sizes: tuple[int, ...]
    both_images: int
    taus: tuple[int, ...]
    adaptive: tuple[int, ...]
    tau_size: int
    cost_images: int
    published: tuple[PublishedTable, ...]
    sizes: tuple[int, ...] = SIZES


@dataclass(frozen=True)
class CompositionRecord:
    """All sets of a size, drawn by one method and judged.

    Attributes:
        method: see `Key`, as for the next two.
        size: of the sets.
        kind: of the sets.
        sets: ids of their adapters.
        shown: whether each image shows each element, ``[sets, images, size]``.
        kept: whether each shows the digit that its prompt names, ``[sets, images]``; empty where it
            names none.
    """

    method: str
    size: int
    kind: Kind
    sets: tuple[Names, ...]
    shown: tuple[tuple[tuple[bool, ...], ...], ...]
    kept: tuple[tuple[bool, ...], ...] = ()

    @property
    def key(self) -> Key:
        """Tell it from all others."""
        return Key(self.method, self.size, self.kind)

    @cached_property
    def array(self) -> Bool[np.ndarray, "sets images size"]:
        """``shown`` as an array."""
        return np.array(self.shown, dtype=bool)

    @property
    def share(self) -> tuple[float, float]:
        """Percent of elements that are shown, and the standard error over sets."""
        own = 100 * self.array.mean(axis=(1, 2))
        return float(own.mean()), float(own.std(ddof=1) / np.sqrt(len(own)))


@dataclass(frozen=True)
class CostRecord:
    """What a method takes to draw images with one set.

    Attributes:
        method: one of `METHODS`.
        size: adapters of the set.
        calls: of the U-Net.
        rows: of its batches, all calls together.
        seconds: CPU seconds, the median of some runs.
    """

    method: str
    size: int
    calls: int
    rows: int
    seconds: float

    @property
    def key(self) -> tuple[str, int]:
        """Tell it from all others."""
        return self.method, self.size


def named_sizes(spec: CompositionSpec) -> list[int]:
    """Sizes of the sets without their character."""
    return [size - 1 for size in spec.sizes if size > 2]


def turns_named(method: Switch | AdaptiveSwitch) -> str:
    """Name of the records of a method with other turns.

    Example:
        >>> turns_named(Switch(3)), turns_named(AdaptiveSwitch(2))
        ('switch, tau 3', 'adaptive switch, turns 2')
    """
    if isinstance(method, Switch):
        return f"{SWITCH}, tau {method.tau}"
    return f"{ADAPTIVE}, turns {method.turns}"
