"""Flags of `lora-ws reproduce`, and what they mean for one file of `eval/`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar
from typing import Protocol as Interface

from lora_ws.config import nearest
from lora_ws.errors import ConfigError
from lora_ws.experiments.recipes import PROTOCOLS, Protocol, cores, recipe
from lora_ws.learn.spec import ExperimentSpec


@dataclass(frozen=True)
class ReproduceSpec:
    """Run a table, figure or experiment of `eval/` and report it beside the published numbers.

    Attributes:
        dataset: collection to use instead of the bundled one, such as lora-ws-10k
        subset: subset of the collection; null takes the card's first
        protocol: splits and model selection; null takes all three for tables and clean for figures
        seeds: number of seeds; null takes the recipes' ten
        processes: parallel processes; null takes one per core, and one to build zoos
        controls: also evaluate plain inputs, other prompts, unseen leaves and shuffled labels
        rows: rows of a table, or readers, such as '["FlatVec"]'; null takes all
        columns: for `readers`: columns, such as '["constant prompt"]'; null takes all
        draws: for `readers`: number of learning rates and weight decays to try per network; the
            validation rows select
        size: for `readers`: parameter budget, such as 1.3M; null takes the recipes' networks
        zoos: for `transfer`: folder of zoos, where those that are missing are built; null takes one
            below out
        photos: for `transfer`: source of the photos of zoos that are missing, instead of the
            recipe's
        out: folder of runs and reports; null makes one below runs/
    """

    dataset: str | None = None
    subset: str | None = None
    protocol: Literal["clean", "paper", "as-run", "all"] | None = None
    seeds: int | None = None
    processes: int | None = None
    controls: bool = True
    rows: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    draws: int = 0
    size: str | None = None
    zoos: Path | None = None
    photos: str | None = None
    out: Path | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """Flags that were given, ``out`` aside."""
        names = (own.name for own in fields(self) if getattr(self, own.name) != own.default)
        return tuple(name for name in names if name != "out")


@dataclass(frozen=True)
class Options:
    """One file of `eval/`, as asked for.

    Attributes:
        name: of the file.
        out: folder of runs and reports.
        flags: of the command; its ``out`` is not asked again.
    """

    name: str
    out: Path
    flags: ReproduceSpec = field(default_factory=ReproduceSpec)

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """Protocols of tables; figures take the first."""
        asked = self.flags.protocol
        return PROTOCOLS if asked is None or asked == "all" else (asked,)

    @property
    def processes(self) -> int:
        """How many work at once: as asked for, else one per core of this machine or cluster."""
        return cores(self.flags.processes)

    @property
    def folder(self) -> Path:
        """Where the report of trained classifiers goes."""
        return self.out / self.name

    def spec(self, name: str, default: str) -> ExperimentSpec:
        """A recipe on the collection asked for."""
        flags = self.flags
        return recipe(name, flags.dataset or default, flags.subset, flags.seeds)

    def run_folder(self, *names: str) -> Path:
        """Where a recipe's run is kept, shared by all that use it.

        One ``out`` holds one collection and subset.
        """
        return Path(self.out, "runs", *names)


class Named(Interface):
    """A row or column of a file of `eval/`."""

    @property
    def name(self) -> str:
        """Its title."""
        ...


N = TypeVar("N", bound=Named)


def asked_for(items: Sequence[N], names: Sequence[str] | None, missing: str) -> tuple[N, ...]:
    """Rows or columns of these names, in the order of the file; None takes all.

    Args:
        items: of the file.
        names: as a flag gives them.
        missing: the flag, and what is said before a name that there is not.

    Raises:
        ConfigError: there is none of a name.
    """
    known = [item.name for item in items]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"{missing} `{name}`{nearest(name, known)}")
    return tuple(item for item in items if names is None or item.name in names)
