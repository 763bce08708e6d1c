"""Networks that read representations: plain modules, no training in them."""

from lora_ws.models.many import ManyMLP
from lora_ws.models.mlp import MLP

__all__ = ["MLP", "ManyMLP"]
