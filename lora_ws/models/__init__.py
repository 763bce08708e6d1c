"""Metanetworks: networks that read adapters, each behind the one seam of `Metanetwork`."""

from lora_ws.models.base import InputSpec, MetanetModule, Metanetwork
from lora_ws.models.deep_sets import DeepSets
from lora_ws.models.mlp import MLP
from lora_ws.models.module_transformer import ModuleTransformer

__all__ = [
    "DeepSets",
    "InputSpec",
    "MLP",
    "MetanetModule",
    "Metanetwork",
    "ModuleTransformer",
]
