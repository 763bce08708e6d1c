"""What the file of a figure of layers holds, and the flags of `lora-ws sweep`."""

from dataclasses import dataclass
from typing import Literal

from lora_ws.experiments.kinds import EvalSpec
from lora_ws.learn.spec import ExperimentSpec

Over = Literal["layers", "matrices", "all_but_top"]


@dataclass(frozen=True)
class Claim:
    """A number that a figure's text states: the best layer that fits ``where``, in percent."""

    claim: str
    where: str
    accuracy: float
    dataset: str


@dataclass(frozen=True)
class LayersSpec(EvalSpec):
    """The figure of layers: a sweep over layers, one over matrices, one leaving the best out."""

    dataset: str
    recipes: dict[Over, str]
    published: tuple[Claim, ...] = ()
    tolerance: float = 2.0


@dataclass(frozen=True)
class SweepSpec(ExperimentSpec):
    """The same experiment on each layer, on each matrix, or without the best layers.

    Attributes:
        over: layers (A and B of each), matrices (each A and each B alone), or all_but_top (all
            layers but the best 1, 2, 4, … by validation accuracy of a sweep over layers).
        processes: parallel processes; null takes one per core.
        shard: share i of n for a job array, as ``i/n``; all shares write to the same folder.
        top: number of layers to list.
    """

    over: Over = "layers"
    processes: int | None = None
    shard: str = "0/1"
    top: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_single()

    def experiment(self) -> ExperimentSpec:
        """The experiment alone, without what makes it a sweep."""
        own = {name: getattr(self, name) for name in ExperimentSpec.__dataclass_fields__}
        return ExperimentSpec(**own)
