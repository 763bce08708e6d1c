"""Weights of pipelines as the single files of their makers have them, under their names."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


# Of OpenCLIP, in this order.
OPEN_CLIP = (
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
)
# Of SD3's transformer: first what stands outside of blocks.
SD3 = (
    ("pos_embed.pos_embed", "pos_embed"),
    ("pos_embed.proj", "x_embedder.proj"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("proj_out", "final_layer.linear"),
    ("transformer_blocks.", "joint_blocks."),
    ("ff_context.net.0.proj", "context_block.mlp.fc1"),
    ("ff_context.net.2", "context_block.mlp.fc2"),
    ("ff.net.0.proj", "x_block.mlp.fc1"),
    ("ff.net.2", "x_block.mlp.fc2"),
    ("norm1_context.linear", "context_block.adaLN_modulation.1"),
    ("norm1.linear", "x_block.adaLN_modulation.1"),
    ("attn.to_out.0", "x_block.attn.proj"),
    ("attn.to_add_out", "context_block.attn.proj"),
)
SD3_QKV = {
    "x_block": ("to_q", "to_k", "to_v"),
    "context_block": tuple(f"add_{x}_proj" for x in "qkv"),
}
Weights = dict[str, Tensor]


def write_single_file(pipeline: Any, file: Path) -> Path:
    """Write a pipeline of Stable Diffusion 1.x or 2.x, SDXL or SD3 as one file."""
    tensors: Weights = {}
    if getattr(pipeline, "transformer", None) is not None:
        tensors |= _prefixed("model.diffusion_model.", _sd3(pipeline.transformer))
        for name, encoder in zip(("clip_l", "clip_g", "t5xxl"), _encoders(pipeline), strict=True):
            own = encoder.state_dict()
            if name == "clip_l":
                # Its vector is taken as it is, so that makers leave the identity out.
                del own["text_projection.weight"]
            tensors |= _prefixed(f"text_encoders.{name}.transformer.", own)
    else:
        config = pipeline.unet.config
        for name, value in pipeline.unet.state_dict().items():
            inner = _unet(name, config.layers_per_block, config.up_block_types)
            tensors[f"model.diffusion_model.{inner}"] = value
        one, *two = _encoders(pipeline)
        if two:
            tensors |= _prefixed("conditioner.embedders.0.transformer.", _clip(one))
            tensors |= _prefixed("conditioner.embedders.1.model.", _open_clip(two[0]))
        elif config.use_linear_projection:
            tensors |= _prefixed("cond_stage_model.model.", _open_clip(one))
        else:
            tensors |= _prefixed("cond_stage_model.transformer.", _clip(one))
    levels = len(pipeline.vae.config.block_out_channels)
    for name, value in pipeline.vae.state_dict().items():
        tensors[f"first_stage_model.{_vae(name, levels)}"] = value
    # Some weights are one tensor under two names.
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, file)
    return file


def _encoders(pipeline: Any) -> list[Any]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [part for name in names if (part := getattr(pipeline, name, None)) is not None]


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def _clip(encoder: Any) -> Weights:
    """Newer versions of transformers leave the prefix out."""
    own = encoder.state_dict().items()
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in own}


def _open_clip(encoder: Any) -> Weights:
    """CLIP as OpenCLIP has it: queries, keys and values are one matrix."""
    own = {name.removeprefix("text_model."): x for name, x in encoder.state_dict().items()}
    made: Weights = {}
    if (projection := own.pop("text_projection.weight", None)) is not None:
        made["text_projection"] = projection.T
    for name, value in own.items():
        for ours, theirs in OPEN_CLIP:
            name = name.replace(ours, theirs)
        if ".q_proj." not in name:
            made[name] = value
            continue
        every = [own[_unmade(name).replace("q_proj", f"{part}_proj")] for part in "qkv"]
        made[re.sub(r"q_proj\.(\w+)$", r"in_proj_\1", name)] = torch.cat(every)
    return {name: x for name, x in made.items() if not re.search(r"\.[kv]_proj\.", name)}


def _unmade(name: str) -> str:
    for ours, theirs in reversed(OPEN_CLIP):
        name = name.replace(theirs, ours)
    return name


def _sd3(transformer: Any) -> Weights:
    """Queries, keys and values are one matrix; the last norms have shift before scale."""
    own, made = dict(transformer.state_dict()), Weights()
    last = len(transformer.transformer_blocks) - 1
    for block in range(last + 1):
        for side, parts in SD3_QKV.items():
            for end in ("weight", "bias"):
                names = [f"transformer_blocks.{block}.attn.{part}.{end}" for part in parts]
                made[f"joint_blocks.{block}.{side}.attn.qkv.{end}"] = torch.cat(
                    [own.pop(name) for name in names]
                )
    for name, value in own.items():
        if name.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
            value = torch.cat(value.chunk(2)[::-1])
        for ours, theirs in SD3:
            if ours in name:
                name = name.replace(ours, theirs)
        made[name] = value
    return made


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
