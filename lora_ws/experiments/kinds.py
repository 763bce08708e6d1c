"""The kinds of files in `eval/`: ``kind:`` names one, `KINDS` names the function that runs it."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lora_ws.config import load_spec, spec_file, spec_files
from lora_ws.errors import ConfigError
from lora_ws.experiments.options import Options


class Kind(NamedTuple):
    """A kind of table, figure or experiment.

    Attributes:
        run: ``module:function`` of `Run`; its first parameter is annotated with the type of spec.
        flags: of `lora-ws reproduce` that it takes, beside ``--out``.
    """

    run: str
    flags: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether it trains classifiers on a collection, by recipes of `training/`."""
        return "dataset" in self.flags


TRAINS = (
    "dataset",
    "subset",
    "protocol",
    "seeds",
    "processes",
    "controls",
    "rows",
)
# Imported only when called: drawing, and training adapters, needs the `diffusion` extra.
KINDS = {
    "table": Kind("lora_ws.experiments.table.run:run", TRAINS),
    "readers": Kind("lora_ws.experiments.readers.run:run", (*TRAINS, "columns", "draws", "size")),
    "layers": Kind("lora_ws.experiments.layers.run:run", TRAINS),
    "principal_components": Kind("lora_ws.experiments.principal_components.run:run", TRAINS),
    "transfer": Kind(
        "lora_ws.experiments.transfer.run:run", ("processes", "rows", "zoos", "photos")
    ),
    "composition": Kind("lora_ws.experiments.composition.run:run"),
    "attribution": Kind("lora_ws.experiments.attribution.run:run"),
    "cad": Kind("lora_ws.experiments.cad.run:run"),
}
Run = Callable[[Any, Options], Path]


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """What every file of `eval/` says.

    Attributes:
        kind: one of `KINDS`, which defines the other keys of the file.
        title: title of the report.
        source: source of the published numbers.
        cpu_minutes: CPU minutes on one core, from the committed records; null where unknown.
    """

    kind: str
    title: str
    source: str
    cpu_minutes: float | None = None

    @property
    def cost(self) -> str:
        """Say what a run takes, for who is about to start one.

        Example:
            >>> EvalSpec(kind="table", title="", source="", cpu_minutes=18.6).cost
            'at least 9 minutes on two cores, as the committed run without flags took'
            >>> EvalSpec(kind="cad", title="", source="").cost
            'how long it takes was not measured'
        """
        if self.cpu_minutes is None:
            return "how long it takes was not measured"
        minutes = max(1, round(self.cpu_minutes / 2))
        plural = "s" * (minutes > 1)
        return (
            f"at least {minutes} minute{plural} on two cores, "
            "as the committed run without flags took"
        )


def eval_file(name: str) -> Path:
    """Path of a file in `eval/`.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    return spec_file("eval", name)


def kind_of(name: str) -> Kind:
    """The kind of a file in `eval/`.

    Raises:
        ConfigError: there is no such file, or its ``kind:`` is unknown.
    """
    file = eval_file(name)
    kind = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("kind")
    if kind not in KINDS:
        raise ConfigError(f"{file}: kind: expected one of {', '.join(KINDS)}, got {kind}")
    return KINDS[kind]


def trained() -> list[str]:
    """Names of all files in `eval/` that train classifiers on a collection."""
    return [name for name in spec_files("eval") if kind_of(name).trains]


def load_eval(name: str) -> tuple[Run, Any]:
    """A file of `eval/`: the function that runs it, and its spec."""
    module, _, function = kind_of(name).run.partition(":")
    run: Run = getattr(importlib.import_module(module), function)
    spec_type = next(iter(inspect.signature(run).parameters.values())).annotation
    return run, load_spec(spec_type, eval_file(name))


def run_eval(options: Options) -> Path:
    """Run and report one file of `eval/`; what has been measured is not measured again.

    Returns:
        The folder of the report.
    """
    run, spec = load_eval(options.name)
    return run(spec, options)
