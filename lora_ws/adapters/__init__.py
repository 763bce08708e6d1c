"""One adapter: its layout, its names, and how a file becomes factors."""

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.layout import LayerSpec, Layout, Matrix
from lora_ws.adapters.reader import read_adapter

__all__ = ["Adapter", "LayerSpec", "Layout", "Matrix", "Module", "read_adapter"]
