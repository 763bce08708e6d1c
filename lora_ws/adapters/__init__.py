"""One adapter: its layout, its names, and how a file becomes factors."""

from lora_ws.adapters.layout import LayerSpec, Layout, Matrix
from lora_ws.adapters.reader import Adapter, read_adapter

__all__ = ["Adapter", "LayerSpec", "Layout", "Matrix", "read_adapter"]
