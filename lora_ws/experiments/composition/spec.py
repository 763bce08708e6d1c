"""What the file of the experiment on composition holds, and what the experiment keeps."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from lora_ws.composition.testbed import SIZES
from lora_ws.diffusion.methods import Composite, Merge, Method, Switch
from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.quoted import PublishedTable

NONE, MERGE = "no adapter", "merge"
# Method and what its scales are multiplied by; the paper's own runs have all at 0.8.
METHODS: dict[str, tuple[Method, float]] = {
    NONE: (Merge(), 0.0),
    MERGE: (Merge(), 1.0),
    "merge at 0.8": (Merge(), 0.8),
    "merge-normalised": (Merge(normalised=True), 1.0),
    "switch": (Switch(), 1.0),
    "composite": (Composite(), 1.0),
}
Names = tuple[str, ...]
# Method, size of the sets, and whether prompts name a digit.
Key = tuple[str, int, bool]


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
        digits: pictures of every set without a character, each of another digit.
        taus: turns of Switch that are compared.
        tau_size: adapters of the sets that they are compared on.
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
    taus: tuple[int, ...]
    tau_size: int
    published: tuple[PublishedTable, ...]
    sizes: tuple[int, ...] = SIZES


@dataclass(frozen=True)
class CompositionRecord:
    """All sets of a size, drawn by one method and judged.

    Attributes:
        method: one of `METHODS`, or ``switch, tau <n>``.
        size: adapters per set.
        sets: ids of their adapters.
        shown: whether each picture shows each element, ``[sets, images, size]``.
        kept: whether each shows the digit that its prompt names, ``[sets, images]``; empty where it
            names none.
    """

    method: str
    size: int
    sets: tuple[Names, ...]
    shown: tuple[tuple[tuple[bool, ...], ...], ...]
    kept: tuple[tuple[bool, ...], ...] = ()

    @property
    def key(self) -> Key:
        """Tell it from all others."""
        return self.method, self.size, bool(self.kept)

    @cached_property
    def array(self) -> Bool[np.ndarray, "sets images size"]:
        """``shown`` as an array."""
        return np.array(self.shown, dtype=bool)

    @property
    def share(self) -> tuple[float, float]:
        """Percent of elements that are shown, and the standard error over sets."""
        own = 100 * self.array.mean(axis=(1, 2))
        return float(own.mean()), float(own.std(ddof=1) / np.sqrt(len(own)))


def named_sizes(spec: CompositionSpec) -> list[int]:
    """Sizes of the sets without their character."""
    return [size - 1 for size in spec.sizes if size > 2]


def switch_named(tau: int) -> str:
    """Name of the records of Switch with turns of ``tau`` steps."""
    return f"switch, tau {tau}"
