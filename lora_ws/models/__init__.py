"""Metanetworks: networks that read adapters, each behind the one seam of `Metanetwork`."""

from lora_ws.models.base import InputSpec, MetanetModule, Metanetwork
from lora_ws.models.deep_sets import DeepSets
from lora_ws.models.gl_net import GLNet
from lora_ws.models.left_gram import LeftGram
from lora_ws.models.mlp import MLP
from lora_ws.models.module_transformer import ModuleTransformer
from lora_ws.models.mvprobe import MVProbe
from lora_ws.models.o_align_mlp import OAlignMLP
from lora_ws.models.probex import ProbeX
from lora_ws.models.sign_net import SignNet
from lora_ws.models.sketch_transformer import SketchTransformer
from lora_ws.models.spectral_mlp import SpectralMLP
from lora_ws.models.w2t import W2T

__all__ = [
    "DeepSets",
    "GLNet",
    "InputSpec",
    "LeftGram",
    "MLP",
    "MVProbe",
    "MetanetModule",
    "Metanetwork",
    "ModuleTransformer",
    "OAlignMLP",
    "ProbeX",
    "SignNet",
    "SketchTransformer",
    "SpectralMLP",
    "W2T",
]
