"""Module names of the models that adapters are made for, and the other names these modules have.

Names written with underscores cannot be read back by rule, as `_` stands both between and inside
names. So all names a family can have are made here once, and looked up.
"""

import re
from collections.abc import Iterator
from functools import cache

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK = (
    *(f"attn1.{name}" for name in ATTENTION),
    *(f"attn2.{name}" for name in ATTENTION),
    "ff.net.0.proj",
    "ff.net.2",
)
# Order of definition inside a transformer block, which indexed files count by.
INDEXED_BLOCK = (*BLOCK[:4], "ff.net.0.proj", *BLOCK[4:8])
INDEXED_TEXT = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")
RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
TEXT_LAYER = (*INDEXED_TEXT, "mlp.fc1", "mlp.fc2")
# More than any of the families has; a name too many can be looked up by nobody.
UNET_LEVELS, UNET_UNITS, UNET_DEPTH, TEXT_LAYERS, DIT_BLOCKS = 4, 4, 10, 32, 60
UNET_TOP = ("conv_in", "conv_out")
UNET_EMBEDDINGS = ("time_embedding", "add_embedding")

# The blocks of FLUX and of HunyuanVideo, which has `img_attn_proj` where FLUX has `img_attn.proj`:
# name in the model's own repository -> name in diffusers.
DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    # XLabs: 1 is the stream of the image, 2 that of the text.
    "processor.proj1": "attn.to_out.0",
    "processor.proj2": "attn.to_add_out",
}
SINGLE = {
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "modulation.linear": "norm.linear",
    "processor.proj": "proj_out",
}
# The blocks of SD3.
JOINT = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
FLUX_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
# HunyuanVideo's beside its blocks, where its own repository has other names than FLUX's.
_TIME_TEXT = "time_text_embed"
REFINER, REFINER_BLOCKS = "txt_in.individual_token_refiner.blocks", 4
REFINED = "context_embedder.token_refiner.refiner_blocks"
HUNYUAN_TOP = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    **{
        f"{theirs}.mlp.{k}": f"{ours}.linear_{k // 2 + 1}"
        for theirs, ours in {
            "time_in": f"{_TIME_TEXT}.timestep_embedder",
            "guidance_in": f"{_TIME_TEXT}.guidance_embedder",
            "txt_in.t_embedder": f"context_embedder.{_TIME_TEXT}.timestep_embedder",
        }.items()
        for k in (0, 2)
    },
    **{
        f"txt_in.c_embedder.linear_{k}": f"context_embedder.{_TIME_TEXT}.text_embedder.linear_{k}"
        for k in (1, 2)
    },
    **{
        f"{REFINER}.{k}.{theirs}": f"{REFINED}.{k}.{ours}"
        for theirs, ours in {
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        }.items()
        for k in range(REFINER_BLOCKS)
    },
}
# SD3's beside its blocks.
SD3_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
    **{
        f"{theirs}.mlp.{k}": f"{_TIME_TEXT}.{ours}.linear_{k // 2 + 1}"
        for theirs, ours in {
            "t_embedder": "timestep_embedder",
            "y_embedder": "text_embedder",
        }.items()
        for k in (0, 2)
    },
}
# Several modules of diffusers in one matrix there: see `adapters/fused.py`.
FUSED_DOUBLE = (
    *("img_attn.qkv", "txt_attn.qkv", "img_attn_qkv", "txt_attn_qkv"),
    *("processor.qkv1", "processor.qkv2"),
)
FUSED_SINGLE = ("linear1", "processor.qkv")
FUSED_JOINT = (
    *("x_block.attn.qkv", "x_block.attn2.qkv", "context_block.attn.qkv"),
    "context_block.adaLN_modulation.1",
)
# Blocks there -> blocks in diffusers, the names in them, and the fused ones.
ORIGINAL_BLOCKS = {
    "double_blocks": ("transformer_blocks", DOUBLE, FUSED_DOUBLE),
    "single_blocks": ("single_transformer_blocks", SINGLE, FUSED_SINGLE),
    "joint_blocks": ("transformer_blocks", JOINT, FUSED_JOINT),
}
FUSED_REFINER = tuple(f"{REFINER}.{k}.self_attn_qkv" for k in range(REFINER_BLOCKS))
FUSED_TOP = ("final_layer.adaLN_modulation.1", *FUSED_REFINER)
# Names beside blocks that other models have too, or that no model of diffusers has.
TOP = {**SD3_TOP, **HUNYUAN_TOP, **FLUX_TOP}
_DOUBLE_PARTS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj"),
    *("attn.add_v_proj", *DOUBLE.values()),
)
_SINGLE_PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", *SINGLE.values())

# Numbers of the original implementation of SDXL's U-Net (SGM) -> names in diffusers.
_SGM = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)|middle_block_(\d)_(.+)")
_SGM_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_SGM_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


@cache
def by_underscores(component: str) -> dict[str, str]:
    """Name with underscores -> dotted name, of all modules a component can have.

    Example:
        >>> by_underscores("unet")["mid_block_attentions_0_proj_in"]
        'mid_block.attentions.0.proj_in'
    """
    names = {"unet": _unet, "transformer": _transformer}.get(component, _text_encoder)()
    return {name.replace(".", "_"): name for name in names}


def original_name(path: str) -> str | None:
    """Name in diffusers of a module of FLUX's, HunyuanVideo's or SD3's own repository.

    Fused modules keep theirs.

    Returns None where it is no such module.

    Example:
        >>> original_name("double_blocks.3.img_mlp.2"), original_name("single_blocks.0.linear1")
        ('transformer_blocks.3.ff.net.2', 'single_blocks.0.linear1')
    """
    kind, _, rest = path.partition(".")
    number, _, part = rest.partition(".")
    block, names, fused = ORIGINAL_BLOCKS.get(kind, ("", {}, ()))
    if part in names:
        return f"{block}.{number}.{names[part]}"
    return path if part in fused or path in FUSED_TOP else TOP.get(path)


def sgm_name(path: str) -> str:
    """Name, with underscores, in diffusers of a module by the numbers of SGM; others stay.

    Example:
        >>> sgm_name("input_blocks_4_1_transformer_blocks_0_attn1_to_q")
        'down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q'
    """
    if path in _SGM_TOP:
        return _SGM_TOP[path]
    found = _SGM.fullmatch(path)
    if not found:
        return path
    side, block, unit, rest, middle, middle_rest = found.groups()
    if middle is not None:
        kind = "attentions_0" if middle == "1" else f"resnets_{int(middle) // 2}"
        return f"mid_block_{kind}_{_SGM_RESNET.get(middle_rest, middle_rest)}"
    number = int(block) - (side == "input")
    level = f"{'down' if side == 'input' else 'up'}_blocks_{number // 3}"
    if rest == "op":
        return f"{level}_downsamplers_0_conv"
    if rest == "conv":
        return f"{level}_upsamplers_0_conv"
    kind = "resnets" if unit == "0" else "attentions"
    return f"{level}_{kind}_{number % 3}_{_SGM_RESNET.get(rest, rest)}"


@cache
def transformer_names() -> frozenset[str]:
    """Dotted names of the modules that `by_underscores` finds in transformers.

    Example:
        >>> "double_blocks.0.img_attn.proj" in transformer_names()
        True
    """
    return frozenset(_transformer())


@cache
def sgm_names() -> dict[str, str]:
    """Name in diffusers with underscores -> name by the numbers of SGM: the inverse of `sgm_name`.

    Example:
        >>> sgm_names()["up_blocks_0_attentions_2_proj_out"]
        'output_blocks_2_1_proj_out'
    """
    blocks = [f"input_blocks_{k}" for k in range(1, 9)] + [f"output_blocks_{k}" for k in range(9)]
    inner = [f"transformer_blocks_{k}_{n}" for k in range(UNET_DEPTH) for n in BLOCK]
    rests = [n.replace(".", "_") for n in ("proj_in", "proj_out", *inner)]
    old = [f"{block}_1_{rest}" for block in (*blocks, "middle_block") for rest in rests]
    old += [f"{block}_0_{rest}" for block in blocks for rest in (*_SGM_RESNET, "op")]
    old += [f"middle_block_{k}_{rest}" for k in (0, 2) for rest in _SGM_RESNET]
    old += [f"output_blocks_{k}_2_conv" for k in (2, 5)]
    return {sgm_name(name): name for name in (*_SGM_TOP, *old)}


@cache
def indexed(component: str) -> tuple[str, ...]:
    """Modules of Stable Diffusion 1.x in the order by which cloneofsimo's files number them.

    Example:
        >>> len(indexed("unet")), indexed("unet")[-9]
        (144, 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q')
    """
    if component != "unet":
        layers = (f"text_model.encoder.layers.{k}" for k in range(12))
        return tuple(f"{layer}.{name}" for layer in layers for name in INDEXED_TEXT)
    units = [f"down_blocks.{level}.attentions.{k}" for level in range(3) for k in range(2)]
    units += [f"up_blocks.{level}.attentions.{k}" for level in range(1, 4) for k in range(3)]
    units += ["mid_block.attentions.0"]
    return tuple(f"{unit}.transformer_blocks.0.{name}" for unit in units for name in INDEXED_BLOCK)


def _unet() -> Iterator[str]:
    yield from UNET_TOP
    yield from (f"{name}.linear_{k}" for name in UNET_EMBEDDINGS for k in (1, 2))
    blocks = [f"{side}_blocks.{k}" for side in ("down", "up") for k in range(UNET_LEVELS)]
    for block in (*blocks, "mid_block"):
        yield from (f"{block}.resnets.{k}.{name}" for k in range(UNET_UNITS) for name in RESNET)
        yield from (f"{block}.{side}samplers.0.conv" for side in ("down", "up"))
        for unit in (f"{block}.attentions.{k}" for k in range(UNET_UNITS)):
            yield from (f"{unit}.proj_in", f"{unit}.proj_out")
            inner = (f"{unit}.transformer_blocks.{k}" for k in range(UNET_DEPTH))
            yield from (f"{stem}.{name}" for stem in inner for name in BLOCK)


def _transformer() -> Iterator[str]:
    for k in range(DIT_BLOCKS):
        yield from (f"transformer_blocks.{k}.{part}" for part in _DOUBLE_PARTS)
        yield from (f"single_transformer_blocks.{k}.{part}" for part in _SINGLE_PARTS)
        for kind, (_, names, fused) in ORIGINAL_BLOCKS.items():
            yield from (f"{kind}.{k}.{part}" for part in (*names, *fused))
    yield from (*TOP, *FLUX_TOP.values(), *FUSED_TOP, "norm_out.linear")


def _text_encoder() -> Iterator[str]:
    layers = (f"text_model.encoder.layers.{k}" for k in range(TEXT_LAYERS))
    yield from (f"{layer}.{name}" for layer in layers for name in TEXT_LAYER)
    yield "text_projection"
