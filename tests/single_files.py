"""Weights of Stable Diffusion as the single files of its makers have them: names of LDM."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_single_file(pipeline: Any, file: Path) -> Path:
    """Write a pipeline of Stable Diffusion 1.x as one file."""
    layers = pipeline.unet.config.layers_per_block
    kinds = pipeline.unet.config.up_block_types
    levels = len(pipeline.vae.config.block_out_channels)
    tensors: dict[str, Tensor] = {}
    for name, value in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet(name, layers, kinds)}"] = value
    for name, value in pipeline.vae.state_dict().items():
        tensors[f"first_stage_model.{_vae(name, levels)}"] = value
    for name, value in pipeline.text_encoder.state_dict().items():
        inner = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{inner}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def _unet(name: str, layers: int, kinds: Sequence[str]) -> str:
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, block, kind, number, rest = _parts(name)
    if kind == "resnets":
        head, end = rest.rsplit(".", 1)
        rest = f"{RESNET[head]}.{end}"
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    place = {"resnets": 0, "attentions": 1}
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{(layers + 1) * block + number + 1}.{place[kind]}.{rest}"
    if kind == "upsamplers":
        # After the block's last layer, and its attention where it has any.
        attends = "CrossAttn" in kinds[block]
        return f"output_blocks.{(layers + 1) * block + layers}.{1 + attends}.{rest}"
    return f"output_blocks.{(layers + 1) * block + number}.{place[kind]}.{rest}"


def _parts(name: str) -> tuple[str, int, str, int, str]:
    found = re.fullmatch(r"(\w+?_blocks?)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
    assert found, name
    side, block, kind, number, rest = found.groups()
    return side, int(block or 0), kind, int(number), rest


def _vae(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    for kind, theirs in (("resnets", "block"), (r"upsamplers\.0", "upsample")):
        name = re.sub(
            rf"up_blocks\.(\d+)\.{kind}",
            lambda m, end=theirs: f"up.{levels - 1 - int(m[1])}.{end}",
            name,
        )
    return name
