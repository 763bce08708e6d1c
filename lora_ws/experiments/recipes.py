"""Recipes of `training/` by name and protocol, on any collection."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from lora_ws.config import load_spec, spec_file
from lora_ws.errors import ConfigError
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.system import cpus

Protocol = Literal["clean", "paper", "as-run"]
PROTOCOLS: tuple[Protocol, ...] = ("clean", "paper", "as-run")


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
    return spec_file("training", name)


def cores(processes: int | None) -> int:
    """How many processes to run: as asked for, else one per core that this process may use."""
    if processes is not None and processes < 1:
        raise ConfigError(f"processes: expected at least 1, got {processes}")
    return processes or cpus()
