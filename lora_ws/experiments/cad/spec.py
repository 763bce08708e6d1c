"""What the file of the experiment on erased digits holds, and what the experiment keeps."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lora_ws.concepts.spec import Per
from lora_ws.diffusion.digits import NAMES, check_digits
from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import EvalSpec

# What weights are scored by, and what each is.
CAD, FIRST, INTEGRATED = "CAD", "CAD, true first order", "integrated"
SCORES = {
    CAD: "weight times gradient, the other prediction taken for a constant",
    FIRST: "the same, gradients through both predictions (`--stop_gradient false`)",
    INTEGRATED: "CAD, gradients averaged on the way from all weights off to all on",
}
CONTRASTIVE, BOTH = "CAD, contrastive", "integrated, contrastive"
METHODS = {
    "random": "as many weights, drawn at random",
    "largest": "as many weights, the largest of each matrix",
    CAD: SCORES[CAD],
    FIRST: SCORES[FIRST],
    CONTRASTIVE: "CAD less what the other nine digits need (`--preserve`)",
    INTEGRATED: f"{SCORES[INTEGRATED]} (`--scores integrated`)",
    BOTH: "the same, less what the other nine digits need",
}
NONE = "none"
# What is measured: scores against the truth, edits by what is drawn, and amplified digits.
Part = Literal["scores", "edit", "amplify"]


class Key(NamedTuple):
    """Tells records apart.

    Attributes:
        part: what was measured.
        digit: that was scored, erased or amplified.
        method: of `METHODS`, or "none"; empty where there is no edit.
        budget: share of the weights that are set to 0.
    """

    part: Part
    digit: str
    method: str = ""
    budget: float = 0.0


@dataclass(frozen=True)
class CadSpec(EvalSpec):
    """An experiment on digits.

    Attributes:
        base: name of the base model; one that knows digits by name.
        digits: that are erased, one at a time.
        budgets: shares of weights.
        per: what the shares are of.
        seeds: trajectories behind the scores.
        steps: latents of each.
        points: on the way of integrated scores.
        guidance: scale of guidance, of trajectories and of images.
        images: drawn and judged of an erased or amplified digit, by each wording.
        neighbours: images drawn and judged of every other digit.
        prompt: that scores are of; `{}` stands for a digit.
        wordings: other prompts by which an erased digit is asked for.
        amplified: prompt by which the base draws digits badly.
        amplify_budget: share of all weights that are set to 0 there.
        singles: weights that are set to 0 one at a time, those of the highest scores.
        concentrated: shares of the weights, from the highest on.
        published: quantity -> value.
    """

    base: str
    digits: tuple[str, ...]
    budgets: tuple[float, ...]
    per: Per
    seeds: int
    steps: int
    points: int
    guidance: float
    images: int
    neighbours: int
    prompt: str
    wordings: tuple[str, ...]
    amplified: str
    amplify_budget: float
    singles: int
    concentrated: tuple[float, ...]
    published: dict[str, str]

    def __post_init__(self) -> None:
        check_digits(self.digits)
        for wording in (self.prompt, self.amplified, *self.wordings):
            if "{}" not in wording:
                raise ConfigError(f"wordings: expected `{{}}` for the digit, got `{wording}`")

    @property
    def shown_budget(self) -> float:
        """The budget that is looked at closely: the first."""
        return self.budgets[0]

    def others(self, digit: str) -> list[str]:
        """All digits but one."""
        return [name for name in NAMES if name != digit]


def says(wording: str, digit: str) -> str:
    """A prompt for a digit.

    Example:
        >>> says("{} {}", "six")
        'six six'
    """
    return wording.replace("{}", digit)


@dataclass(frozen=True)
class CadRecord:
    """What one part of the experiment found.

    Attributes:
        part: what was measured; see `Key`, as for the next three.
        digit: that it is of.
        method: of the edit.
        budget: of the edit.
        values: its numbers.
    """

    part: Part
    digit: str
    method: str
    budget: float
    values: dict[str, Any]

    @property
    def key(self) -> Key:
        """Tell it from all others."""
        return Key(self.part, self.digit, self.method, self.budget)
