"""One adapter: its layout, its names, and how a file becomes factors."""

import warnings
from typing import Any

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.layout import LayerSpec, Layout, Matrix
from lora_ws.adapters.locate import AdapterRef, find_adapters
from lora_ws.adapters.reader import AdapterFile, open_adapter, read_adapter

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterRef",
    "LayerSpec",
    "Layout",
    "Matrix",
    "Module",
    "find_adapters",
    "open_adapter",
    "read_adapter",
]

# Names of before, for one release.
_OLD = {"Place": AdapterRef, "find_places": find_adapters, "place_of": AdapterRef.parse}


def __getattr__(name: str) -> Any:
    if name not in _OLD:
        raise AttributeError(f"module `lora_ws.adapters` has no attribute `{name}`")
    new = _OLD[name]
    message = f"lora_ws.adapters.{name} is now {new.__qualname__}; the old name goes next release"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return new
