"""Metanetworks: networks that read adapters, each behind the one seam of `Metanetwork`."""

from lora_ws.models.base import InputSpec, MetanetModule, Metanetwork
from lora_ws.models.mlp import MLP

__all__ = ["InputSpec", "MLP", "MetanetModule", "Metanetwork"]
