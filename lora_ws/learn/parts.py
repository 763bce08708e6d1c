"""Loggers and callbacks of Lightning, made of what a spec says."""

import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

from lora_ws.config import nearest, to_plain
from lora_ws.errors import ConfigError
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.learn.trainer_spec import Part

# What the loggers that are no part of an install need.
NEEDS = {
    "WandbLogger": "wandb",
    "TensorBoardLogger": "tensorboard",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet-ml",
    "NeptuneLogger": "neptune",
}


def make_loggers(spec: ExperimentSpec, folder: Path) -> list[Logger]:
    """A CSV file, and what the spec asks for, told the spec; each seed is a run of its own.

    Raises:
        ConfigError: there is no such logger, or a package or parameter of it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = vars(lightning.pytorch.loggers)
    made: list[Logger] = [CSVLogger(folder.parent, name="", version=folder.name)]
    for part in spec.trainer.loggers:
        made.append(_make(part, "trainer.loggers", Logger, known, _usual(spec, folder)))
        # The folder of the run has them in config.yaml.
        made[-1].log_hyperparams(to_plain(spec))
    return made


def make_callbacks(spec: ExperimentSpec) -> list[Callback]:
    """What the spec asks for beside what training needs.

    Raises:
        ConfigError: there is no such callback, or a parameter does not fit.
    """
    known = vars(lightning.pytorch.callbacks)
    return [
        _make(part, "trainer.callbacks", Callback, known, {}) for part in spec.trainer.callbacks
    ]


def _usual(spec: ExperimentSpec, folder: Path) -> dict[str, dict[str, Any]]:
    """Parameters of loggers that the spec need not say."""
    experiment = f"{spec.dataset} {spec.name}"
    # In a list of runs it has to be told from those of other specs and subsets.
    title = " ".join(filter(None, [spec.name, spec.subset, folder.name.replace("-", " ")]))
    return {
        "WandbLogger": {
            "project": "lora_ws",
            "group": experiment,
            "name": title,
            "save_dir": folder,
        },
        "TensorBoardLogger": {"save_dir": folder, "name": "", "version": "tensorboard"},
        "MLFlowLogger": {"experiment_name": experiment, "run_name": title},
        "CometLogger": {"name": title},
        "CSVLogger": {"save_dir": folder},
    }


def _make(
    part: Part, key: str, kind: type, known: Mapping[str, Any], usual: dict[str, dict[str, Any]]
) -> Any:
    path, own = (part, {}) if isinstance(part, str) else (part["class_path"], part.get("init_args"))
    name = path.rpartition(".")[2]
    made = _class(path, key, kind, known)
    given = {**usual.get(name, {}), **(own or {})}
    try:
        inspect.signature(made).bind(**given)
    except TypeError as error:
        raise ConfigError(f"{key}: {name}: {error}") from error
    try:
        return made(**given)
    except ImportError as error:
        needs = NEEDS.get(name, error.name or "another package")
        raise ConfigError(f"{key}: {name} needs {needs}: pip install {needs}") from error


def _class(path: str, key: str, kind: type, known: Mapping[str, Any]) -> type:
    """Find a class by its name in Lightning, or by its dotted path."""
    names = {
        name: value
        for name, value in known.items()
        if isinstance(value, type) and issubclass(value, kind) and value is not kind
    }
    if "." not in path:
        if path not in names:
            raise ConfigError(f"{key}: no class `{path}`{nearest(path, list(names))}")
        return names[path]
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: cannot load `{path}` ({error})") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{key}: expected a {kind.__name__} of Lightning, got `{path}`")
    return found
