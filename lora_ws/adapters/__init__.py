"""One adapter: its layout, its names, and how a file becomes factors."""

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.layout import LayerSpec, Layout, Matrix
from lora_ws.adapters.locate import AdapterRef
from lora_ws.adapters.reader import AdapterFile, open_adapter, read_adapter
from lora_ws.adapters.search import FoundAdapters, find_adapters
from lora_ws.errors import old_names

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterRef",
    "FoundAdapters",
    "LayerSpec",
    "Layout",
    "Matrix",
    "Module",
    "find_adapters",
    "open_adapter",
    "read_adapter",
]

__getattr__ = old_names(
    __name__,
    {
        "Place": "lora_ws.adapters:AdapterRef",
        "find_places": "lora_ws.adapters:find_adapters",
        "place_of": "lora_ws.adapters:AdapterRef.parse",
    },
)
