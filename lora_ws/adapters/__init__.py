"""One adapter: its layout, its names, and how a file becomes factors."""

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.layout import LayerSpec, Layout, Matrix
from lora_ws.adapters.places import Place, find_places, place_of
from lora_ws.adapters.reader import AdapterFile, open_adapter, read_adapter

__all__ = [
    "Adapter",
    "AdapterFile",
    "LayerSpec",
    "Layout",
    "Matrix",
    "Module",
    "Place",
    "find_places",
    "open_adapter",
    "place_of",
    "read_adapter",
]
