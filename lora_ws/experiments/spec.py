"""What a table or figure consists of: the data in `eval/`, and the flags of reproduce and sweep."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lora_ws.config import load_spec, nearest, spec_files
from lora_ws.errors import ConfigError
from lora_ws.learn.spec import ExperimentSpec

Protocol = Literal["clean", "paper", "as-run"]
PROTOCOLS: tuple[Protocol, ...] = ("clean", "paper", "as-run")
Over = Literal["layers", "matrices", "all_but_top"]


@dataclass(frozen=True)
class RowSpec:
    """A row of a table.

    Attributes:
        name: what the row is called.
        recipes: protocol, or ``protocol@dataset``, -> recipe in `training/`.
        published: dataset -> metric -> mean and standard deviation in percent.
        ours: whether it is not the paper's.
        note: what a reader should know of it.
    """

    name: str
    recipes: dict[str, str]
    published: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    ours: bool = False
    note: str = ""

    def recipe(self, protocol: Protocol, dataset: str) -> str | None:
        """The recipe of a protocol; None where it cannot be repeated.

        What the paper's text leaves open is done as in the clean protocol.
        """
        chain: dict[Protocol, tuple[Protocol, ...]] = {
            "clean": ("clean",),
            "paper": ("paper", "clean"),
            "as-run": ("as-run",),
        }
        for name in chain[protocol]:
            for key in (f"{name}@{dataset}", name):
                if key in self.recipes:
                    return self.recipes[key]
        return None


@dataclass(frozen=True)
class InputSpec:
    """A control: a plain input that says what the rows of a table must beat."""

    name: str
    recipe: str


@dataclass(frozen=True)
class TableSpec:
    """A table: rows, what is published of them, and the controls beside them.

    Attributes:
        title: what it shows.
        source: where the published numbers are from.
        dataset: collection it is made from where none is asked for.
        rows: of the table.
        inputs: plain inputs as controls.
        tolerance: measured and published differ where their means are further apart than so many
            standard deviations of their difference over seeds.
        layer_by: part whose loss chooses a single layer for every row; empty takes all layers.
        nested: rows whose choice of a layer is also measured in nested cross-validation.
    """

    title: str
    source: str
    dataset: str
    rows: tuple[RowSpec, ...]
    inputs: tuple[InputSpec, ...] = ()
    tolerance: float = 2.0
    layer_by: Literal["", "val"] = ""
    nested: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A number that a figure's text states: the best layer that fits ``where``, in percent."""

    claim: str
    where: str
    accuracy: float
    dataset: str


@dataclass(frozen=True)
class LayersSpec:
    """The figure of layers: a sweep over layers, one over matrices, one leaving the best out."""

    title: str
    source: str
    dataset: str
    recipes: dict[Over, str]
    published: tuple[Claim, ...] = ()
    tolerance: float = 2.0


@dataclass(frozen=True)
class ComponentsSpec:
    """The figure of principal components: one recipe a protocol, many K.

    Attributes:
        title: what it shows.
        source: where the published numbers are from.
        dataset: collection it is made from where none is asked for.
        recipes: protocol -> recipe.
        components: every K.
        published: dataset -> K -> accuracy in percent; null where it is drawn, not printed.
        tolerance: as in a table.
    """

    title: str
    source: str
    dataset: str
    recipes: dict[Protocol, str]
    components: tuple[int, ...]
    published: dict[str, dict[int, float | None]] = field(default_factory=dict)
    tolerance: float = 2.0


@dataclass(frozen=True)
class SweepSpec(ExperimentSpec):
    """The same experiment on each layer, on each matrix, or without the best layers.

    Attributes:
        over: layers (A and B of each), matrices (each A and each B alone), or all_but_top (all
            layers but the 1, 2, 4, … that are best by validation accuracy of a sweep over layers).
        processes: how many work at once; null takes one a core.
        shard: share i of n for a job array, as ``i/n``; shares write into the same folder.
        top: how many of the best to list.
    """

    over: Over = "layers"
    processes: int | None = None
    shard: str = "0/1"
    top: int = 10

    def experiment(self) -> ExperimentSpec:
        """The experiment alone, without what makes it a sweep."""
        own = {name: getattr(self, name) for name in ExperimentSpec.__dataclass_fields__}
        return ExperimentSpec(**own)


def recipe(name: str, dataset: str, subset: str | None, seeds: int | None) -> ExperimentSpec:
    """A recipe of `training/` on some collection."""
    spec = load_spec(ExperimentSpec, recipe_file(name))
    # Flags of a recipe that name the recipe's own collection do not carry over to another.
    return replace(
        spec, dataset=dataset, subset=subset, seeds=spec.seeds if seeds is None else seeds
    )


def recipe_file(name: str) -> Path:
    """Path of a recipe.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    files = spec_files("training")
    if name not in files:
        raise ConfigError(f"no recipe `{name}` in training/{nearest(name, list(files))}")
    return files[name]


def eval_file(name: str) -> Path:
    """Path of a table or figure in `eval/`."""
    return spec_files("eval")[name]


def cores(processes: int | None) -> int:
    """How many processes to run: as asked for, else one a core that this process may use."""
    if processes is not None and processes < 1:
        raise ConfigError(f"processes: expected at least 1, got {processes}")
    return processes or len(os.sched_getaffinity(0))
