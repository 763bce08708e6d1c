"""What the file of the experiment on erased digits holds, and what the experiment keeps."""

from dataclasses import dataclass

from lora_ws.concepts.spec import Per
from lora_ws.diffusion.digits import check_digits
from lora_ws.experiments.kinds import EvalSpec

METHODS = {
    "random": "as many weights, drawn at random",
    "largest": "as many weights, the largest of each matrix",
    "CAD": "weight times gradient, the other prediction taken for a constant",
    "CAD, true first order": "the same, gradients through both predictions",
    "CAD, contrastive": "CAD less what the other nine digits need",
}


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
        guidance: scale of guidance, of trajectories and of pictures.
        images: drawn and judged of every digit.
        published: quantity -> value.
    """

    base: str
    digits: tuple[str, ...]
    budgets: tuple[float, ...]
    per: Per
    seeds: int
    steps: int
    guidance: float
    images: int
    published: dict[str, str]

    def __post_init__(self) -> None:
        check_digits(self.digits)


@dataclass(frozen=True)
class CadRecord:
    """One edit, judged.

    Attributes:
        digit: that was erased.
        method: one of `METHODS`, or "none".
        budget: share of weights.
        changed: how many.
        target: share of the digit's pictures that still show it.
        others: mean share of the other digits' pictures that show them.
    """

    digit: str
    method: str
    budget: float
    changed: int
    target: float
    others: float

    @property
    def key(self) -> tuple[str, str, float]:
        """Tell it from all others."""
        return self.digit, self.method, self.budget
