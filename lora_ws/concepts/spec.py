"""`EraseSpec` and `AmplifySpec`: what `lora-ws concepts` is asked for.

Their fields are the commands' flags and the keys of a YAML file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_ws.errors import ConfigError

Per = Literal["row", "matrix", "global"]
Eligible = Literal["ff", "attention", "all"]
ScoreMethod = Literal["taylor", "integrated"]


@dataclass(frozen=True, kw_only=True)
class EditSpec:
    """Which weights of a base are set to zero for a concept.

    Attributes:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub.
        concept: prompt of it, such as "a photo of three".
        budget: share of the weights.
        per: of each row, of each matrix, or of all (global).
        eligible: ff, the feed-forward parts of transformer blocks; attention; or all.
        scores: taylor, weight times gradient; or integrated, gradients averaged on the way from
            all of these weights off to all on.
        steps: noise levels that scores are from.
        guidance_scale: scale of classifier-free guidance of all images.
        out: folder for the edit, its numbers, pictures and page.
    """

    base: str
    concept: str
    budget: float
    per: Per = "matrix"
    eligible: Eligible = "ff"
    scores: ScoreMethod = "taylor"
    steps: int = 50
    guidance_scale: float = 3.0
    out: Path

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps: expected at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class EraseSpec(EditSpec):
    """Set the weights to zero that do most for a concept.

    Attributes:
        preserve: prompts of what is to stay; weights that these need are spared.
        seeds: trajectories that scores are from.
    """

    budget: float = 0.05
    preserve: list[str] | None = None
    seeds: int = 3
    out: Path = Path("erased")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ConfigError(f"seeds: expected at least 1, got {self.seeds}")


@dataclass(frozen=True, kw_only=True)
class AmplifySpec(EditSpec):
    """Set the weights to zero that work most against a concept, judged on images that it draws.

    Attributes:
        images: how many are drawn to judge by.
        seed: of the images and the noise.
    """

    budget: float = 0.001
    images: int = 16
    seed: int = 0
    out: Path = Path("amplified")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise ConfigError(f"images: expected at least 1, got {self.images}")
