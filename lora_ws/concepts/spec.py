"""`EraseSpec` and `AmplifySpec`: what `lora-ws concepts` is asked for.

Their fields are the commands' flags and the keys of a YAML file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_ws.diffusion.base_spec import PipelineSpec
from lora_ws.diffusion.generation import MOST_GUIDANCE, MOST_IMAGES, MOST_SEED, MOST_STEPS
from lora_ws.errors import ConfigError, check_range

Per = Literal["row", "matrix", "global"]
Eligible = Literal["ff", "attention", "all"]
ScoreMethod = Literal["taylor", "integrated"]
# Of an adapter; no matrix that is edited is wider.
MOST_RANK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class EditSpec(PipelineSpec):
    """How the weights of a base are selected and set to zero for a concept.

    Attributes:
        concept: prompt of the concept, such as "a photo of three".
        budget: share of the weights to set to zero.
        per: apply the budget per row, per matrix, or to all weights (global).
        eligible: weights to select from: ff (feed-forward), attention, or all.
        scores: taylor: weight times gradient; integrated: gradients averaged along the path from
            all eligible weights off to all on.
        steps: noise levels used for the scores.
        guidance_scale: scale of classifier-free guidance.
        out: folder for the edit, its metrics, images and page.
    """

    concept: str
    budget: float
    per: Per = "matrix"
    eligible: Eligible = "ff"
    scores: ScoreMethod = "taylor"
    steps: int = 50
    guidance_scale: float = 3.0
    out: Path

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ConfigError(f"budget: expected a share above 0 and up to 1, got {self.budget:g}")
        check_range("steps", self.steps, 1, MOST_STEPS)
        check_range("guidance_scale", self.guidance_scale, 0, MOST_GUIDANCE)


@dataclass(frozen=True, kw_only=True)
class EraseSpec(EditSpec):
    """Erase a concept by setting the weights that support it most to zero.

    Attributes:
        preserve: prompts of concepts to keep; weights that they need are not changed.
        neighbours: prompts of other concepts whose images are compared before and after the edit.
        stop_gradient: take the predictions of the empty prompt for constants in gradients, as
            published; false gives scores that are first-order in the measure.
        seeds: trajectories used for the scores.
    """

    budget: float = 0.05
    preserve: list[str] | None = None
    neighbours: list[str] | None = None
    stop_gradient: bool = True
    seeds: int = 3
    out: Path = Path("erased")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.concept in (self.preserve or []):
            raise ConfigError(
                f"preserve: expected concepts other than the erased one, got `{self.concept}`"
            )
        if self.concept in (self.neighbours or []):
            raise ConfigError(
                f"neighbours: expected concepts other than the erased one, got `{self.concept}`"
            )
        check_range("seeds", self.seeds, 1, MOST_IMAGES)


@dataclass(frozen=True, kw_only=True)
class AmplifySpec(EditSpec):
    """Amplify a concept by setting the weights that work most against it to zero.

    Attributes:
        images: generated images of the concept used for the scores.
        seed: of the images and the noise.
    """

    budget: float = 0.001
    images: int = 16
    seed: int = 0
    out: Path = Path("amplified")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("images", self.images, 1, MOST_IMAGES)
        check_range("seed", self.seed, 0, MOST_SEED)


@dataclass(frozen=True, kw_only=True)
class ApplySpec:
    """What to write a kept edit as.

    Attributes:
        base: the base that the edit was made for.
        out: folder, new or empty.
        to: pipeline, the edited base as a diffusers folder; or adapter, a file that does the same
            to the base.
        rank: of the adapter; null is exact, at the full rank of each matrix.
    """

    base: str
    out: Path
    to: Literal["pipeline", "adapter"] = "pipeline"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_range("rank", self.rank, 1, MOST_RANK)
            if self.to == "pipeline":
                raise ConfigError("rank: expected --to adapter, got --to pipeline")
