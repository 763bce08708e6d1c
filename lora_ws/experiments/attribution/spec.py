"""What the file of the experiment on attribution holds, and what the experiment keeps."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from lora_ws.diffusion.digits import check_digits
from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.quoted import PublishedTable

Values = dict[str, Any]


@dataclass(frozen=True)
class AttributionSpec(EvalSpec):
    """An experiment on adapters of the bundled testbed.

    Attributes:
        base: of the adapters.
        adapters: that are stacked.
        scale: of each.
        mixture: other scales, which sparse codes are to recover.
        digits: that are drawn, by name.
        seeds: pictures of each digit.
        steps: of denoising.
        guidance: its scale.
        starts: shares of the steps before adapters are left out.
        resume: step that pseudo-ablation resumes at.
        fixed_point_iters: of inversion.
        boxes: left, top, right, bottom in pixels.
        published: numbers of others.
    """

    base: str
    adapters: tuple[str, ...]
    scale: float
    mixture: tuple[float, ...]
    digits: tuple[str, ...]
    seeds: int
    steps: int
    guidance: float
    starts: tuple[float, ...]
    resume: int
    fixed_point_iters: int
    boxes: tuple[tuple[int, int, int, int], ...]
    published: tuple[PublishedTable, ...]

    def __post_init__(self) -> None:
        check_digits(self.digits)
        if len(self.mixture) != len(self.adapters):
            raise ConfigError(
                f"mixture: expected {len(self.adapters)} scales, got {len(self.mixture)}"
            )

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """Prompt and seed of every picture."""
        every = product(range(self.seeds), self.digits)
        return [(f"a photo of {digit}", seed) for seed, digit in every]

    @property
    def shown(self) -> int:
        """Number of the picture that the report shows."""
        return min(3, len(self.pictures) - 1)


@dataclass(frozen=True)
class AttributionRecord:
    """What one part of the experiment found.

    Attributes:
        stage: one of the stages of ``run.py``.
        values: its numbers.
    """

    stage: str
    values: Values

    @property
    def key(self) -> str:
        """Tell it from all others."""
        return self.stage
