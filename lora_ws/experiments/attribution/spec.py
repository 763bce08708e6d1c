"""What the file of the experiment on attribution holds, and what the experiment keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from lora_ws.diffusion.digits import check_digits
from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.quoted import PublishedTable

Values = dict[str, Any]


# What is measured, each on images of its own number.
STAGES = ("ablation", "blocks", "sparse codes", "boxes", "inversion")
# Latents that adapters are left out from late; the last compares with the image itself.
WAYS = CACHED, INVERTED, UNGUIDED = "cached", "inverted", "inverted, unguided"
ORIGINAL = "inverted, unguided, from the picture"


@dataclass(frozen=True)
class AttributionSpec(EvalSpec):
    """An experiment on adapters of the bundled testbed.

    Attributes:
        base: of the adapters.
        adapters: that are stacked.
        scales: of each; such that each is the first of about as many images.
        block_scale: of each where blocks are compared.
        mixture: other scales, which sparse codes are to recover.
        digits: that are drawn, by name.
        pictures: stage -> how many; one of each digit, then one more of each.
        dictionary: images of each digit that sparse codes are learned from, drawn by the base.
        dictionary_steps: of denoising of these, of which every second is kept.
        steps: of denoising.
        guidance: its scale.
        left: how many steps are left when adapters are left out late.
        fixed_point_iters: of inversion.
        boxes: adapter -> where it acts: left, top, right, bottom in pixels.
        levels: of noise that gradients in boxes are averaged over.
        published: numbers of others.
    """

    base: str
    adapters: tuple[str, ...]
    scales: tuple[float, ...]
    block_scale: float
    mixture: tuple[float, ...]
    digits: tuple[str, ...]
    pictures: Mapping[str, int]
    dictionary: int
    dictionary_steps: int
    steps: int
    guidance: float
    left: tuple[int, ...]
    fixed_point_iters: int
    boxes: Mapping[str, tuple[int, int, int, int]]
    levels: int
    published: tuple[PublishedTable, ...]

    def __post_init__(self) -> None:
        check_digits(self.digits)
        for name in ("scales", "mixture"):
            if len(getattr(self, name)) != len(self.adapters):
                raise ConfigError(
                    f"{name}: expected {len(self.adapters)} scales, got {len(getattr(self, name))}"
                )
        if set(self.pictures) != set(STAGES) or min(self.pictures.values()) < 1:
            raise ConfigError(
                f"pictures: expected a number for {', '.join(STAGES)}, got {self.pictures}"
            )
        if set(self.boxes) != set(self.adapters):
            raise ConfigError(f"boxes: expected one for each adapter, got {', '.join(self.boxes)}")
        if not all(0 < left <= self.steps for left in self.left):
            raise ConfigError(f"left: expected 1 to {self.steps} steps, got {self.left}")

    def drawn(self, stage: str) -> list[tuple[str, int]]:
        """Prompt and seed of every image of a stage; a stage of more has those of the others."""
        number = self.pictures[stage]
        every = islice(product(range(number), self.digits), number)
        return [(f"a photo of {digit}", seed) for seed, digit in every]

    @property
    def shown(self) -> int:
        """Number of the image that the report shows."""
        return min(3, len(self.drawn("ablation")) - 1)


@dataclass(frozen=True)
class AttributionRecord:
    """What one part of the experiment found.

    Attributes:
        stage: one of `STAGES`.
        values: its numbers.
    """

    stage: str
    values: Values

    @property
    def key(self) -> str:
        """Tell it from all others."""
        return self.stage
