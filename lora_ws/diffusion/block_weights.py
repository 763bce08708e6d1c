"""Weights of an adapter per block of a U-Net, as hobby tools give them (``lbw``).

Blocks are named as in the original code of Stable Diffusion: ``in00`` to ``in11``, ``mid``,
``out00`` to ``out11``, and ``base`` for text encoders. A level with l layers on the way down is
l + 1 blocks: ``down_blocks.b``, layer k, is ``in(1 + b (l + 1) + k)``, and its downsampler the
block after them; ``up_blocks.b``, layer k, is ``out(b (l + 1) + k)``, its upsampler in the last.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_ws.adapters import Adapter
from lora_ws.adapters.adapter import Module
from lora_ws.config import nearest
from lora_ws.diffusion.generation import MOST_SCALE
from lora_ws.errors import ConfigError, check_range

BASE, MID = "base", "mid"


def _blocks(ins: range | tuple[int, ...], outs: range) -> tuple[str, ...]:
    return (BASE, *(f"in{k:02}" for k in ins), MID, *(f"out{k:02}" for k in outs))


# The vectors that people share, by their length: those of LoRA leave out blocks without attention.
VECTORS = {
    17: ("SD1.x", _blocks((1, 2, 4, 5, 7, 8), range(3, 12))),
    26: ("SD1.x", _blocks(range(12), range(12))),
    12: ("SDXL", _blocks((4, 5, 7, 8), range(6))),
    20: ("SDXL", _blocks(range(9), range(9))),
}
# Levels of the U-Net.
LEVELS = {"SD1.x": 4, "SDXL": 3}
_IN_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)(?:\.|$)")


def block_named(path: str, layers: int = 2) -> str | None:
    """The block that a module of a U-Net is in; None for what is outside of blocks.

    Args:
        path: of the module, as diffusers spells it.
        layers: residual layers per level on the way down; Stable Diffusion has 2.

    Example:
        >>> block_named("down_blocks.1.attentions.0.proj_in"), block_named("mid_block.resnets.0")
        ('in04', 'mid')
        >>> block_named("up_blocks.3.attentions.2.proj_out"), block_named("time_embedding.linear_1")
        ('out11', None)
    """
    if path.startswith("mid_block"):
        return MID
    if path.startswith("conv_in"):
        return "in00"
    found = _IN_LEVEL.match(path)
    if found is None:
        return None
    way, level, part, layer = found[1], int(found[2]), found[3], int(found[4])
    # The sampler of a level comes after its layers; upwards it shares the last one's block.
    at = layers if "sampler" in part else layer
    if way == "down":
        return f"in{1 + level * (layers + 1) + at:02}"
    return f"out{level * (layers + 1) + at:02}"


def parse_block_weights(text: str, unet: Any) -> dict[str, float]:
    """Read weights of blocks.

    Args:
        text: 17 or 26 numbers for SD1.x, 12 or 20 for SDXL, or names with numbers such as
            ``in04=0.5,mid=0``; blocks without a number have 1.
        unet: what they are for.

    Returns:
        Block -> weight.

    Raises:
        ConfigError: they are neither, or not for this base.

    Example:
        >>> parse_block_weights("mid=0, out03=.5", None)
        {'mid': 0.0, 'out03': 0.5}
    """
    parts = [part.strip() for part in text.split(",")]
    if all("=" in part for part in parts):
        names = {name for _, every in VECTORS.values() for name in every}
        pairs = [part.split("=", 1) for part in parts]
        for name in (name.strip().lower() for name, _ in pairs):
            if name not in names:
                raise ConfigError(
                    f"block_weights: there is no block `{name}`{nearest(name, sorted(names))}"
                )
        return {name.strip().lower(): _number(value) for name, value in pairs}
    weights = [_number(part) for part in parts]
    if len(weights) not in VECTORS:
        raise ConfigError(
            "block_weights: expected 17 or 26 numbers (SD1.x), 12 or 20 (SDXL), or names such as "
            f"in04=0.5,mid=0, got {len(weights)} numbers"
        )
    kind, blocks = VECTORS[len(weights)]
    levels = len(unet.config.down_block_types)
    if levels != LEVELS[kind] or unet.config.layers_per_block != 2:
        raise ConfigError(
            f"block_weights: {len(weights)} numbers are for {kind}, and the base has {levels} "
            "levels; name blocks instead, such as in04=0.5,mid=0"
        )
    return dict(zip(blocks, weights, strict=True))


def weigh_blocks(adapter: Adapter, weights: Mapping[str, float], unet: Any) -> Adapter:
    """Multiply the update of each module by the weight of its block; what has none keeps 1.

    Args:
        adapter: read from a file.
        weights: block -> weight; ``base`` is for all text encoders.
        unet: of the base.
    """
    layers = int(unet.config.layers_per_block)

    def weighed(module: Module) -> Module:
        inside = module.component == "unet"
        block = block_named(module.path, layers) if inside else BASE
        weight = weights.get(block or "", 1.0)
        if weight == 1:
            return module
        rest = (module.scale * weight, module.scale_source, module.kernel, module.needs_base)
        factors = module.down, module.up
        return Module(module.component, module.path, module.method, *factors, *rest)

    modules = {name: weighed(module) for name, module in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(
            f"block_weights: expected numbers such as 1,0.5,0 or in04=0.5, got `{text}`"
        ) from None
    check_range("block_weights", value, -MOST_SCALE, MOST_SCALE)
    return value
