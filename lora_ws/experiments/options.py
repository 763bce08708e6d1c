"""Options of `lora-ws reproduce`."""

from dataclasses import dataclass
from pathlib import Path

from lora_ws.experiments.recipes import PROTOCOLS, Protocol, recipe
from lora_ws.learn.spec import ExperimentSpec


@dataclass(frozen=True)
class Options:
    """Flags of `lora-ws reproduce`.

    Attributes:
        name: of the file in `eval/`.
        out: folder of runs and reports.
        dataset: a collection instead of the one in `eval/`.
        subset: a subset of it; None takes the card's first.
        protocols: of tables; figures take the first.
        seeds: how many instead of the recipes'.
        processes: how many work at once.
        controls: whether a table measures them.
        rows: of a table, by name; None takes all.
        draws: settings of the optimizer that each network tries, validation choosing; 0 takes the
            recipe's.
        size: budget of parameters, by name; None takes the recipes' networks.
    """

    name: str
    out: Path
    dataset: str | None = None
    subset: str | None = None
    protocols: tuple[Protocol, ...] = PROTOCOLS
    seeds: int | None = None
    processes: int = 1
    controls: bool = True
    rows: tuple[str, ...] | None = None
    draws: int = 0
    size: str | None = None

    @property
    def folder(self) -> Path:
        """Where the report of trained classifiers goes."""
        return self.out / self.name

    def spec(self, name: str, default: str) -> ExperimentSpec:
        """A recipe on the collection asked for."""
        return recipe(name, self.dataset or default, self.subset, self.seeds)

    def run_folder(self, *names: str) -> Path:
        """Where a recipe's run is kept, shared by all that use it.

        One ``out`` holds one collection and subset.
        """
        return Path(self.out, "runs", *names)
