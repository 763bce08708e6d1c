"""What the file of a figure of principal components holds."""

from dataclasses import dataclass, field

from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.recipes import Protocol


@dataclass(frozen=True)
class PrincipalComponentsSpec(EvalSpec):
    """The figure of principal components: one recipe per protocol, many K.

    Attributes:
        dataset: default collection.
        recipes: protocol -> recipe.
        components: every K.
        published: dataset -> K -> accuracy in percent; null where it is drawn, not printed.
        tolerance: as in a table.
    """

    dataset: str
    recipes: dict[Protocol, str]
    components: tuple[int, ...]
    published: dict[str, dict[int, float | None]] = field(default_factory=dict)
    tolerance: float = 2.0
