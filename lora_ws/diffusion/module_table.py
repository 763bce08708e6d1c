"""Which modules the denoisers of diffusers have, read off the classes themselves.

Names and sizes of modules tell what a file adapts (`lora_ws.adapters.model_classes`). Reading
files must not need diffusers, so what this finds is kept in the package: `make tables` writes it
anew. A class that diffusers gains is in the next table without a line here, unless it needs
arguments.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_ws.adapters.model_classes import TABLE, block_number, template

__all__ = ["TABLE", "module_table", "table_text"]

DENOISER = re.compile(r"Transformer|UNet|UVit")
# Blocks that other classes are made of, and what is no denoiser of a pipeline that takes adapters.
PARTS = re.compile(
    r"ControlNet|^Transformer2DModel|^DreamLiteTransformer|^TransformerTemporal|^UNet1D|^UNet2DModel|Proteina"
)
# Of classes that cannot be built without arguments; sizes as published.
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "caption_channels": [4096, 4096],
        "llama_layers": list(range(32)),
    },
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "num_layers": 28,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "norm_type": "ada_norm_single",
    },
    "EasyAnimateTransformer3DModel": {
        "in_channels": 33,
        "out_channels": 16,
        "patch_size": 2,
        "text_embed_dim": 3584,
        "text_embed_dim_t5": None,
    },
    "OmniGenTransformer2DModel": {
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0] * 48,
            "long_factor": [1.0] * 48,
        },
    },
}
# Of classes that are published in several sizes, those that are not the default.
PUBLISHED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "SD3Transformer2DModel": (
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
        },
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
    ),
    "WanTransformer3DModel": (
        {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48},
        {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36},
    ),
    "CogVideoXTransformer3DModel": ({"num_layers": 42, "num_attention_heads": 48},),
    "Flux2Transformer2DModel": (
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
        {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
    ),
    "SanaTransformer2DModel": (
        {
            "num_layers": 28,
            "num_attention_heads": 36,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
    ),
}
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def module_table() -> dict[str, dict[str, list[Any]]]:
    """Build every denoiser of the installed diffusers without weights, and list its layers.

    Returns:
        Class -> name of a layer, numbers replaced by ``#`` -> how many blocks have it at most, and
        its inputs and outputs, each pair once.
    """
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    table = {}
    for name in sorted(dir(diffusers)):
        if not DENOISER.search(name) or PARTS.search(name):
            continue
        kind = getattr(diffusers, name)
        if inspect.isclass(kind) and issubclass(kind, ModelMixin):
            table[name] = _layers(kind)
    return table


def table_text() -> str:
    """The table as its file has it: JSON, a class per line."""
    rows = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in module_table().items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _layers(kind: type[torch.nn.Module]) -> dict[str, list[Any]]:
    blocks: dict[str, int] = {}
    sizes: dict[str, set[tuple[int, int]]] = {}
    for arguments in (ARGUMENTS.get(kind.__name__, {}), *PUBLISHED.get(kind.__name__, ())):
        for path, layer in _built(kind, arguments).named_modules():
            if isinstance(layer, LAYERS):
                outputs, inputs = layer.weight.shape[:2]
                name = template(path)
                sizes.setdefault(name, set()).add((inputs, outputs))
                blocks[name] = max(blocks.get(name, 0), block_number(path) + 1)
    return {name: [blocks[name], *sorted(map(list, sizes[name]))] for name in sorted(sizes)}


def _built(kind: type[torch.nn.Module], arguments: Mapping[str, Any]) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{kind.__name__} cannot be built without arguments ({error}); give it a row of "
            "ARGUMENTS, or of PARTS if it is no denoiser"
        ) from error
