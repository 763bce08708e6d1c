"""How tensors and columns are named: a declarative table of endings and prefixes.

A key is *prefix + module path + ending*. Add a row to read another naming scheme.
"""

import re
from functools import cache
from typing import Literal, NamedTuple

from lora_ws.adapters.architectures import by_underscores, flux_name, indexed, sgm_name

Style = Literal["dots", "underscores"]

# What the tensor is to its module. Later rows are for what earlier ones leave; ``n`` is an
# adapter's name or, at XLabs, the number of a stream.
ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern + r"\Z"), role)
    for pattern, role in (
        (r"\.lora[._]down\.weight", "down"),
        (r"\.lora[._]up\.weight", "up"),
        (r"\.lora_linear_layer\.down\.weight", "down"),
        (r"\.lora_linear_layer\.up\.weight", "up"),
        (r"\.lora_A(\.[^.]+)?\.weight", "down"),
        (r"\.lora_B(\.[^.]+)?\.weight", "up"),
        (r"\.lora_E(\.[^.]+)?", "values"),
        (r"\.lora_A", "down"),
        (r"\.lora_B", "up"),
        (r"_lora(?P<n>[12]?)\.down\.weight", "down"),
        (r"_lora(?P<n>[12]?)\.up\.weight", "up"),
        (r"_lora_down\.weight", "down"),
        (r"_lora_up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.alpha", "alpha"),
        (r"\.(?P<role>hada_(w[12]_[ab]|t[12]))", ""),
        (r"\.(?P<role>lokr_(w[12](_[ab])?|t[12]))", ""),
        (r"\.dora_scale", "magnitude"),
        (r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?", "magnitude"),
        (r"\.diff", "diff"),
        (r"\.(?P<role>diff_b|w_norm|b_norm|oft_blocks|oft_diag|rescale|on_input)", ""),
        (r"\.(?P<role>[ab][12]|bm)\.weight", ""),
        (r"\.lora_B(\.[^.]+)?\.bias", "bias"),
        (r"\.(?P<role>lora_embedding_[AB])(\.[^.]+)?", ""),
    )
)
# Roles of updates that nothing here can make into two factors.
FOREIGN_ROLES = ("oft_blocks", "oft_diag", "on_input", "a1", "a2", "b1", "b2", "bm")
# Longest first; "" as component: the path tells.
PREFIXES: tuple[tuple[str, str, Style], ...] = (
    ("base_model.model.unet.", "unet", "dots"),
    ("base_model.model.", "", "dots"),
    ("diffusion_model.", "", "dots"),
    ("lora_transformer_", "transformer", "underscores"),
    ("text_encoder_2.", "text_encoder_2", "dots"),
    ("text_encoder_3.", "text_encoder_3", "dots"),
    ("text_encoder.", "text_encoder", "dots"),
    ("transformer.", "transformer", "dots"),
    # A conversion that went wrong once and is about.
    ("lora_unet_unet_", "unet", "underscores"),
    ("lora_unet_", "", "underscores"),
    ("lora_te1_", "text_encoder", "underscores"),
    ("lora_te2_", "text_encoder_2", "underscores"),
    ("lora_te3_", "text_encoder_3", "underscores"),
    ("lora_te_", "text_encoder", "underscores"),
    ("lycoris_", "", "underscores"),
    ("unet.", "unet", "dots"),
    ("", "", "dots"),
)
DENOISERS = ("unet", "transformer")
_INDEXED = re.compile(r"(unet|text_encoder):(\d+):(down|up)\Z")
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_(in|out)|(time|add)_embedding)\b")
_FLUX = re.compile(r"(single_)?transformer_blocks\.|double_blocks\.|single_blocks\.|final_layer\.")
_OLD_TEXT = re.compile(r"self_attn\.to_(q|k|v|out)\Z")


class Key(NamedTuple):
    """A parsed key.

    Attributes:
        component: ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2`` or ``_3``.
        path: dotted module path inside it, as diffusers spells it; fused modules of FLUX keep
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
    prefix, component, style = next(row for row in PREFIXES if stem.startswith(row[0]))
    place = _dotted(stem[len(prefix) :], component) if style == "dots" else None
    if style == "underscores":
        place = _underscored(stem[len(prefix) :], component)
    return Key(*place, role) if place else None


def _dotted(path: str, component: str) -> tuple[str, str] | None:
    if not component:
        # PEFT saves a component alone, without its name; ComfyUI says diffusion_model for all.
        text = path.startswith("text_model.")
        component = "text_encoder" if text else "unet" if _UNET.match(path) else ""
        if not component and not (_FLUX.match(path) or flux_name(path)):
            return None
        component = component or "transformer"
    if component == "transformer":
        own = re.match(r"double_blocks|single_blocks", path) or flux_name(path)
        path = flux_name(path) or ("" if own else path)
        return (component, path) if path else None
    if component == "unet":
        # Old files name the attention processor between the layer and its projection.
        path = path.replace(".processor.", ".")
        path = re.sub(r"\.to_out\Z", ".to_out.0", path)
        return (component, path) if _UNET.match(path) else None
    path = _OLD_TEXT.sub(r"self_attn.\1_proj", path)
    return component, path


@cache
def _underscored(path: str, component: str) -> tuple[str, str] | None:
    for name in (component,) if component else ("unet", "transformer", "text_encoder"):
        plain = sgm_name(path.replace("_processor_", "_")) if name == "unet" else path
        if plain.endswith("_to_out"):
            plain += "_0"
        if dotted := by_underscores(name).get(plain):
            return (name, flux_name(dotted) or dotted) if name == "transformer" else (name, dotted)
    return None
