"""How tensors and columns are named: a declarative table of suffixes and prefixes.

A key is *prefix + module path + role suffix*. Add a row to read another spelling.
"""

from typing import NamedTuple

from lora_ws.adapters.layout import Role

ROLE_SUFFIXES: dict[str, Role] = {
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
}
ALPHA_SUFFIX = ".alpha"
UNET_PREFIXES = ("base_model.model.unet.", "base_model.model.", "unet.")
# The update then depends on the base model's weights, so that B @ A alone would be wrong.
DORA_MARKS = ("lora_magnitude_vector", "dora_scale")
# Old diffusers files name the attention processor between the layer and its projection.
PATH_INFIX = ".processor"
UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


class Key(NamedTuple):
    """A parsed key: the module path inside the U-Net, and what the tensor is to it."""

    path: str
    role: str


def parse_key(key: str) -> Key | None:
    """Split a tensor key or column name into U-Net module path and role.

    Returns None for whatever is no factor or alpha of a U-Net module.

    Example:
        >>> parse_key("unet.mid_block.attentions.0.attn1.to_q.lora.down.weight")
        Key(path='mid_block.attentions.0.attn1.to_q', role='down')
        >>> parse_key("mid_block.attentions.0.attn1.processor.to_q_lora.up.weight")
        Key(path='mid_block.attentions.0.attn1.to_q', role='up')
        >>> parse_key("text_encoder.layers.0.q_proj.lora_A.weight") is None
        True
    """
    suffixes = {**ROLE_SUFFIXES, ALPHA_SUFFIX: "alpha"}
    suffix = next((end for end in suffixes if key.endswith(end)), None)
    if suffix is None:
        return None
    path = key.removesuffix(suffix)
    for prefix in UNET_PREFIXES:
        if path.startswith(prefix):
            path = path.removeprefix(prefix)
            break
    if not path.startswith(UNET_BLOCKS):
        return None
    return Key(path.replace(f"{PATH_INFIX}.", "."), suffixes[suffix])
