"""Matrices that hold several modules of diffusers, and the rows of each.

Splitting changes the singular values of a module, so it comes before anything that looks at them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lora_ws.adapters.architectures import FUSED_REFINER, FUSED_TOP, ORIGINAL_BLOCKS, REFINED

# Query, key and value of the text in blocks that read both.
_TEXT = ("txt_attn.qkv", "txt_attn_qkv", "processor.qkv2", "context_block.attn.qkv")


class Part(NamedTuple):
    """A module inside a fused one: its path, and its rows of B, in order."""

    path: str
    rows: tuple[slice, ...]


def is_fused(path: str) -> bool:
    """Whether a path names a matrix of several modules."""
    kind, _, rest = path.partition(".")
    *_, names = ORIGINAL_BLOCKS.get(kind, ((),))
    return path in FUSED_TOP or rest.partition(".")[2] in names


def parts(path: str, inputs: int, outputs: int) -> Sequence[Part] | None:
    """The modules in a fused matrix; None where its height cannot be theirs.

    Args:
        path: of the fused module.
        inputs: columns of its A.
        outputs: rows of its B.

    Example:
        >>> [part.path[-4:] for part in parts("double_blocks.0.img_attn.qkv", 8, 24)]
        ['to_q', 'to_k', 'to_v']
        >>> parts("single_blocks.0.linear1", 8, 56)[-1].rows
        (slice(24, 56, None),)
    """
    if path in FUSED_REFINER:
        number = path.split(".")[-2]
        names = [f"{REFINED}.{number}.attn.to_{x}" for x in "qkv"]
        return _even(names, outputs) if outputs % 3 == 0 else None
    kind, number, name = path.split(".", 2)
    if kind == "final_layer":
        return [Part("norm_out.linear", _halves_swapped(outputs))]
    if kind == "single_blocks":
        stem = f"single_transformer_blocks.{number}"
        names = [f"{stem}.attn.to_{x}" for x in "qkv"]
        if name == "linear1":
            if outputs <= 3 * inputs:
                return None
            return [
                *_even(names, 3 * inputs),
                Part(f"{stem}.proj_mlp", (slice(3 * inputs, outputs),)),
            ]
        return _even(names, outputs) if outputs % 3 == 0 else None
    stem = f"transformer_blocks.{number}"
    if name == "context_block.adaLN_modulation.1":
        # In the last block, which makes nothing of the text, these are a shift and a scale.
        rows = _halves_swapped(outputs) if outputs == 2 * inputs else (slice(0, outputs),)
        return [Part(f"{stem}.norm1_context.linear", rows)]
    names = [f"{stem}.attn.add_{x}_proj" for x in "qkv"]
    if name not in _TEXT:
        attention = "attn2" if "attn2" in name else "attn"
        names = [f"{stem}.{attention}.to_{x}" for x in "qkv"]
    return _even(names, outputs) if outputs % 3 == 0 else None


def _halves_swapped(outputs: int) -> tuple[slice, ...]:
    """Of diffusers, which keeps scale before shift, where the original keeps shift before scale."""
    half = outputs // 2
    return slice(half, outputs), slice(0, half)


def _even(names: Sequence[str], height: int) -> list[Part]:
    step = height // len(names)
    return [Part(name, (slice(k * step, (k + 1) * step),)) for k, name in enumerate(names)]
