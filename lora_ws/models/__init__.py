"""Metanetworks: networks that read adapters, each behind the one seam of `Metanetwork`.

Names are loaded on first use: a verdict needs the spec of one network, and often no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ws.models.base import Metanetwork
    from lora_ws.models.deep_sets import DeepSets
    from lora_ws.models.gl_net import GLNet
    from lora_ws.models.inputs import InputSpec
    from lora_ws.models.left_gram import LeftGram
    from lora_ws.models.mlp import MLP
    from lora_ws.models.module import MetanetModule
    from lora_ws.models.module_transformer import ModuleTransformer
    from lora_ws.models.mvprobe import MVProbe
    from lora_ws.models.o_align_mlp import OAlignMLP
    from lora_ws.models.probex import ProbeX
    from lora_ws.models.sign_net import SignNet
    from lora_ws.models.sketch_transformer import SketchTransformer
    from lora_ws.models.spectral_mlp import SpectralMLP
    from lora_ws.models.w2t import W2T

_HOMES = {
    "DeepSets": "deep_sets",
    "GLNet": "gl_net",
    "InputSpec": "inputs",
    "LeftGram": "left_gram",
    "MLP": "mlp",
    "MVProbe": "mvprobe",
    "MetanetModule": "module",
    "Metanetwork": "base",
    "ModuleTransformer": "module_transformer",
    "OAlignMLP": "o_align_mlp",
    "ProbeX": "probex",
    "SignNet": "sign_net",
    "SketchTransformer": "sketch_transformer",
    "SpectralMLP": "spectral_mlp",
    "W2T": "w2t",
}
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `lora_ws.models` has no attribute `{name}`")
    return getattr(importlib.import_module(f"lora_ws.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
