"""How tensors and columns are named: a declarative table of endings and prefixes.

A key is *prefix + module path + ending*. Add a row to read another naming scheme.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from lora_ws.adapters.architectures import (
    by_underscores,
    indexed,
    original_name,
    sgm_name,
    transformer_names,
)
from lora_ws.adapters.model_classes import find_module, last_name, unet_last_names

# What the tensor is to its module. Later rows are for what earlier ones leave; ``n`` is an
# adapter's name or, at XLabs, the number of a stream.
ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern + r"\Z"), role)
    for pattern, role in (
        (r"\.lora[._](B|up)(\.[^.]+)?\.bias", "bias"),
        (r"(\.lora)?\.lora[._](A|down)(\.[^.]+)?(\.weight)?", "down"),
        (r"(\.lora)?\.lora[._](B|up)(\.[^.]+)?(\.weight)?", "up"),
        (r"\.lora_linear_layer\.down\.weight", "down"),
        (r"\.lora_linear_layer\.up\.weight", "up"),
        (r"\.lora_E(\.[^.]+)?", "values"),
        (r"_lora(?P<n>[12]?)\.down\.weight", "down"),
        (r"_lora(?P<n>[12]?)\.up\.weight", "up"),
        (r"_lora_down\.weight", "down"),
        (r"_lora_up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.alpha", "alpha"),
        (r"\.(?P<role>hada_(w[12]_[ab]|t[12]))", ""),
        (r"\.(?P<role>lokr_(w[12](_[ab])?|t[12]))", ""),
        (
            r"([._](lora|dora))*([._]magnitude(_vector)?|[._]dora[._]scale|\.weight_m_wdecomp)"
            r"(\.[^.]+)?(\.weight)?",
            "magnitude",
        ),
        (r"\.diff", "diff"),
        (r"\.(?P<role>diff_b|w_norm|b_norm|oft_blocks|oft_diag|rescale|on_input)", ""),
        (r"\.(?P<role>[ab][12]|bm)\.weight", ""),
        (r"\.(?P<role>oft_[rR]|boft_[Rs]|ia3_l|hra_u|vera_lambda_[bd])(\.[^.]+)?(\.weight)?", ""),
        (r"\.(?P<role>fourierft_spectrum|shira_weight)(\.[^.]+)?", ""),
        (r"\.(?P<role>lora_embedding_[AB])(\.[^.]+)?", ""),
    )
)
# Roles of updates that are functions of the base model's weights -> their method.
FOREIGN_ROLES = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_r", "oft_R"), "OFT"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT"),
    **dict.fromkeys(("on_input", "ia3_l"), "IA3"),
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm"), "GLoRA"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), "VeRA"),
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "shira_weight": "SHiRA",
}
# What stands before a module's path, in any order and number. Which denoiser a path is of, the path
# tells, as trainers say `unet` and `diffusion_model` for all.
WRAPPERS = (
    *("base_model.model.", "diffusion_model.", "module.", "_orig_mod.", "pipe.", "dit.", "net."),
    *("model.diffusion_model.", "denoiser.", "transformer.", "unet.", "unet_", "lycoris_"),
    *("lora_transformer_", "lora_transformer.", "lora_unet_", "lora_unet.", "lora_prior_unet_"),
)
# What stands before a module's path in a text encoder.
_ENCODER = re.compile(
    r"(?:lora_|lycoris_)?(?:prior_)?(?:te\d?|text_encoders?(?:_\d)?|clip(?:_[lgh])?|(?:um|by)?t5\w*?"
    r"|(?:qwen|llama|gemma|mistral)\w*?|llm|cond_stage_model|conditioner\.embedders\.\d)[._]"
)
# Where such a name says that it is of the second or the third.
_WHICH = (
    (re.compile(r"(?:te|encoder_)2|clip_g|embedders\.1"), "text_encoder_2"),
    (re.compile(r"(?:te|encoder_)3"), "text_encoder_3"),
)
DENOISERS = ("unet", "transformer")
# Of kinds that nothing here reads, such as T5 beside FLUX; listed, and no part of a verdict.
OTHER_ENCODER = "other_text_encoder"
# Where the modules of U-Nets are, those of one's own too.
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\.")
_INDEXED = re.compile(r"(unet|text_encoder):(\d+):(down|up)\Z")
_CLIP = re.compile(r"(?:^|[._])(?:text_model[._])?(encoder[._]layers[._].+|text_projection)\Z")
_OLD_TEXT = re.compile(r"self_attn_to_(q|k|v|out)\Z")
# Names of Wan's own repository -> those of diffusers, with underscores.
_WAN = {
    **{f"self_attn_{x}": f"attn1_to_{x}" for x in "qkv"},
    **{f"cross_attn_{x}": f"attn2_to_{x}" for x in "qkv"},
    "self_attn_o": "attn1_to_out_0",
    "cross_attn_o": "attn2_to_out_0",
    "cross_attn_k_img": "attn2_add_k_proj",
    "cross_attn_v_img": "attn2_add_v_proj",
    "ffn_0": "ffn_net_0_proj",
    "ffn_2": "ffn_net_2",
}
_WAN_BLOCK = re.compile(r"(blocks_\d+_)(\w+)")
REMEMBERED = 1 << 15


class Key(NamedTuple):
    """A parsed key.

    Attributes:
        component: ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``, ``_3``, or
            `OTHER_ENCODER`.
        path: dotted module path inside it, as diffusers spells it; fused modules keep
            their own (`adapters/fused.py`).
        role: what the tensor is to the module.
    """

    component: str
    path: str
    role: str


def split_ending(key: str) -> tuple[str, str] | None:
    """The part before the ending, and the role; None where the key has no ending of the table.

    Example:
        >>> split_ending("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a")
        ('lora_unet_mid_block_attentions_0_proj_in', 'hada_w1_a')
    """
    for pattern, role in ENDINGS:
        found = pattern.search(key)
        if found and found.start():
            named = found.groupdict()
            return key[: found.start()] + (named.get("n") or ""), named.get("role") or role
    return None


def parse_key(key: str) -> Key | None:
    """Split a tensor key or column name into component, module path and role.

    Returns None for whatever is no tensor of an adapter, or of a module that is not known.

    Example:
        >>> parse_key("unet.mid_block.attentions.0.attn1.to_q.lora.down.weight")
        Key(component='unet', path='mid_block.attentions.0.attn1.to_q', role='down')
        >>> parse_key("lora_unet_output_blocks_0_1_proj_in.alpha")
        Key(component='unet', path='up_blocks.0.attentions.0.proj_in', role='alpha')
        >>> parse_key("double_blocks.0.processor.proj_lora1.up.weight").path
        'transformer_blocks.0.attn.to_out.0'
        >>> parse_key("encoder.layer.0.query.lora_A.weight") is None
        True
    """
    if found := _INDEXED.match(key):
        component, number, role = found.groups()
        names = indexed(component)
        return Key(component, names[int(number)], role) if int(number) < len(names) else None
    ending = split_ending(key)
    if ending is None:
        return None
    stem, role = ending
    place = _place(stem)
    return Key(*place, role) if place else None


@lru_cache(REMEMBERED)
def _place(stem: str) -> tuple[str, str] | None:
    """Component and path of a module, by whatever name."""
    starts = [0]
    while prefix := next((name for name in WRAPPERS if stem.startswith(name, starts[-1])), ""):
        starts.append(starts[-1] + len(prefix))
    # A prefix may be part of a name too: `transformer.layers` is not UVit's `transformer_layers`.
    for start in reversed(starts):
        if found := _denoiser(stem[start:]) or _encoder(stem[start:]):
            return found
    return None


def _encoder(path: str) -> tuple[str, str] | None:
    """Of CLIP by either separator; other encoders keep their paths, and a name of their own."""
    prefix = _ENCODER.match(path)
    if not prefix and not path.startswith(("text_model.", "text_model_")):
        return None
    plain = path[prefix.end() if prefix else 0 :]
    found = _CLIP.search(plain)
    name = found[1].replace(".", "_") if found else ""
    name = _OLD_TEXT.sub(r"self_attn_\1_proj", name)
    names = by_underscores("text_encoder")
    if dotted := names.get(f"text_model_{name}") or names.get(name):
        which = (kind for said, kind in _WHICH if prefix and said.search(path))
        return next(which, "text_encoder"), dotted
    return OTHER_ENCODER, plain


def _denoiser(path: str) -> tuple[str, str] | None:
    """Of U-Nets by either numbering, of every class of diffusers, and of blocks of makers' own."""
    plain = path.replace(".", "_")
    # Old files name the attention processor between the layer and its projection.
    bare = sgm_name(plain.replace("_processor_", "_"))
    for name in (bare, f"{bare}_0" if bare.endswith("_to_out") else ""):
        if dotted := by_underscores("unet").get(name):
            return "unet", dotted
        if found := find_module(name):
            return found
    dotted = path if "." in path else by_underscores("transformer").get(plain)
    if dotted in transformer_names():
        return "transformer", original_name(dotted) or dotted
    if (block := _WAN_BLOCK.fullmatch(plain)) and (new := _WAN.get(block[2])):
        return find_module(block[1] + new)
    if _UNET.match(path) and last_name(path) in unet_last_names():
        return "unet", path
    return None
