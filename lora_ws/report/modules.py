"""Names of modules as tables and charts show them."""

import re


def short_name(name: str) -> str:
    """A module's path without what goes without saying.

    Example:
        >>> short_name("down_blocks.0.attentions.1.transformer_blocks.0")
        'down.0.1.0'
    """
    return re.sub(r"_blocks?(?=\.)|\.attentions|\.transformer_blocks", "", name)


def layer_kind(name: str) -> str:
    """``cross-attention v``, ``self-attention q`` and so on, by the module's path."""
    kinds = {"attn1": "self-attention", "attn2": "cross-attention"}
    where = next((kind for part, kind in kinds.items() if part in name), "")
    what = {"to_q": "q", "to_v": "v", "to_k": "k", "to_out": "out"}
    kind = next((short for part, short in what.items() if part in name), "")
    return f"{where} {kind}".strip()
