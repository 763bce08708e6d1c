"""Featurizers and networks as arrays and plain values, and back: no pickle, no code of others."""

import importlib
from typing import Any, Literal

import numpy as np

from lora_ws.adapters import Layout
from lora_ws.errors import ConfigError
from lora_ws.models.base import Metanetwork


def fitted_state(featurizer: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What ``fit`` left behind: arrays, and values that JSON can hold.

    Raises:
        ConfigError: an attribute is neither.
    """
    arrays, values = {}, {}
    for name, value in vars(featurizer).items():
        if not name.endswith("_") or name.startswith("_"):
            continue
        if isinstance(value, np.ndarray) and value.dtype != object:
            arrays[name] = value
        elif isinstance(value, np.generic):
            values[name] = value.item()
        elif _is_plain(value):
            values[name] = value
        else:
            raise ConfigError(
                f"{type(featurizer).__name__}.{name} is a {type(value).__name__}; a bundle holds "
                "arrays, numbers and text only"
            )
    return arrays, values


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def restore(
    info: dict[str, Any],
    tensors: dict[str, np.ndarray],
    layout: Layout,
    allow_classes: tuple[str, ...],
) -> Any:
    """The fitted featurizer again.

    Args:
        info: class, arguments and plain fitted values.
        tensors: fitted arrays, each name after ``featurizer.``; others are left alone.
        layout: what it reads.
        allow_classes: dotted paths of featurizers outside this library that may be imported.

    Raises:
        ConfigError: it names a featurizer that is not allowed.
    """
    featurizer = _construct(info, "featurizer", allow_classes)
    if "layout" in featurizer.get_params():
        featurizer.set_params(layout=layout)
    for key, value in info["fitted"].items():
        setattr(featurizer, key, tuple(value) if isinstance(value, list) else value)
    for key, value in tensors.items():
        if key.startswith("featurizer."):
            setattr(featurizer, key.removeprefix("featurizer."), value)
    return featurizer


def restore_model(info: dict[str, Any], allow_classes: tuple[str, ...]) -> Metanetwork:
    """The network's spec again.

    Args:
        info: class and arguments.
        allow_classes: dotted paths of networks outside this library that may be imported.

    Raises:
        ConfigError: it names a network that is not allowed, or no network.
    """
    model = _construct(info, "model", allow_classes)
    if not isinstance(model, Metanetwork):
        raise ConfigError(f"the bundle's model `{info['class_path']}` is no Metanetwork")
    return model


def _construct(
    info: dict[str, Any], role: Literal["featurizer", "model"], allow_classes: tuple[str, ...]
) -> Any:
    path = info["class_path"]
    # Importing a module runs it, so a bundle may not name any module it likes.
    if not path.startswith(f"lora_ws.{role}s.") and path not in allow_classes:
        raise ConfigError(
            f"the bundle's {role} `{path}` is not part of lora_ws; if you trust it, pass "
            f'allow_classes=("{path}",)'
        )
    module, _, kind = path.rpartition(".")
    arguments = {}
    for name, value in info["init_args"].items():
        if isinstance(value, dict) and "class_path" in value:
            value = _construct(value, role, allow_classes)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return getattr(importlib.import_module(module), kind)(**arguments)
