"""Recipes of `training/` by name and protocol, on any collection."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from lora_ws.adapters import Layout
from lora_ws.collection import load
from lora_ws.config import load_spec, spec_file
from lora_ws.errors import ConfigError, LayoutError
from lora_ws.learn.spec import ExperimentSpec, identity
from lora_ws.models import Metanetwork
from lora_ws.workers import current_engine

Protocol = Literal["clean", "paper", "as-run"]
# What reads best in eval/results/readers with the same training rows as the paper's five: of kernel
# machines, and of networks over factors.
BEST = {
    "UpdateKernel of attn2.to_v > SVC": "metanetworks/update_kernel",
    "left Gram": "metanetworks/left_gram",
}
# Keys of a spec that say which rows are read, and for what.
ROWS = ("dataset", "revision", "subset", "split", "label", "first_rows", "shuffle_labels")
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


def names_no_reader(spec: ExperimentSpec) -> bool:
    """Whether a spec says what to read, and leaves it open how.

    Example:
        >>> names_no_reader(ExperimentSpec(subset="shared/class", seeds=5))
        True
        >>> names_no_reader(ExperimentSpec(matrices=("*.attn2.to_v",)))
        False
    """
    plain, own = identity(ExperimentSpec()), identity(spec)
    return all(own[key] == plain[key] for key in plain if key not in (*ROWS, "protocol"))


def readers(spec: ExperimentSpec) -> dict[str, ExperimentSpec]:
    """What to train for a spec, by title: what it names, or the paper's five and `BEST`."""
    rows = {row.name: row for row in spec.rows()}
    # Neither several devices nor a stack of seeds have what the other two need.
    if not names_no_reader(spec) or spec.trainer.world > 1 or spec.trainer.engine == "batched":
        return rows
    layout = load(spec.dataset, revision=spec.revision).layout
    for title, name in BEST.items():
        own = load_spec(ExperimentSpec, recipe_file(name))
        # A classifier that draws nothing gives the same whatever the seed.
        draws = isinstance(own.model, Metanetwork) or spec.shuffle_labels
        seeds = spec.seeds if draws else 1
        own = replace(
            own,
            **{key: getattr(spec, key) for key in ROWS},
            trainer=spec.trainer,
            seeds=seeds,
            out=None,
        )
        if fits(own, layout):
            rows[title] = own
    return rows


def fits(spec: ExperimentSpec, layout: Layout) -> bool:
    """Whether adapters of a layout have layers that a spec's representation reads.

    Example:
        >>> fits(recipe("metanetworks/update_kernel", "lora-ws-mini", None, None), Layout.sd15_qv())
        True
    """
    try:
        layout.choose(getattr(spec.representation, "matrices", None))
    except LayoutError:
        return False
    return True


def cores(processes: int | None) -> int:
    """How many processes to run: as asked for, else one per core of this machine or cluster."""
    if processes is not None and processes < 1:
        raise ConfigError(f"processes: expected at least 1, got {processes}")
    return processes or current_engine().cpus()
