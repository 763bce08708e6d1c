"""Weights per block: names of blocks, the vectors that people share, what they do to an update."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_ws.adapters import Adapter
from lora_ws.adapters.adapter import Module
from lora_ws.adapters.architectures import sgm_names
from lora_ws.diffusion.block_weights import (
    VECTORS,
    block_named,
    parse_block_weights,
    weigh_blocks,
)
from lora_ws.errors import ConfigError

# Of the original code: blocks with attention are those that files of LoRA have, in their order.
SD = {
    "down_blocks.0.attentions.1": "in02",
    "down_blocks.0.downsamplers.0": "in03",
    "down_blocks.2.attentions.0": "in07",
    "down_blocks.3.resnets.1": "in11",
    "mid_block.attentions.0": "mid",
    "up_blocks.0.resnets.0": "out00",
    "up_blocks.0.upsamplers.0": "out02",
    "up_blocks.1.attentions.0": "out03",
    "up_blocks.3.attentions.2": "out11",
    "conv_in": "in00",
}


def base(levels: int, layers: int = 2) -> Any:
    config = SimpleNamespace(down_block_types=("",) * levels, layers_per_block=layers)
    return SimpleNamespace(config=config)


@pytest.mark.parametrize("path", SD)
def test_blocks_of_stable_diffusion(path: str) -> None:
    assert block_named(f"{path}.some.module") == SD[path]


def test_blocks_of_sdxl_are_those_of_the_original_names() -> None:
    checked = 0
    for path, original in sgm_names().items():
        found = re.match(r"(in|out)put_blocks_(\d+)_|(middle)_block_", original)
        # Of the names that could be, only these two blocks are samplers.
        sampler = original.endswith("_op") and found and found[2] not in ("3", "6")
        if found and not sampler:
            wanted = "mid" if found[3] else f"{found[1]}{int(found[2]):02}"
            dotted = re.sub(r"(blocks|attentions|resnets|samplers)_(\d+)_?", r"\1.\2.", path)
            dotted = re.sub(r"blocks\.(\d+)\._?", r"blocks.\1.", dotted)
            assert block_named(dotted) == wanted, (path, original)
            checked += 1
    assert checked > 500


@pytest.mark.parametrize("length", VECTORS)
def test_vectors_are_read_in_their_order(length: int) -> None:
    kind, blocks = VECTORS[length]
    levels = {"SD1.x": 4, "SDXL": 3}[kind]
    weights = [round(0.1 * k, 1) for k in range(length)]
    read = parse_block_weights(",".join(map(str, weights)), base(levels))
    assert list(read) == list(blocks)
    assert list(read.values()) == weights
    with pytest.raises(ConfigError, match=f"{length} numbers are for {kind}"):
        parse_block_weights(",".join("1" * length), base(7 - levels))


def test_updates_are_multiplied_block_by_block() -> None:
    rng = np.random.default_rng(0)
    places = {
        "down_blocks.1.attentions.0.to_q": ("unet", "in03"),
        "up_blocks.0.attentions.0.to_q": ("unet", "out00"),
        "time_embedding.linear_1": ("unet", ""),
        "text_model.encoder.layers.0.q_proj": ("text_encoder", "base"),
    }
    modules = {
        path: Module(
            component,
            path,
            "lora",
            rng.normal(size=(rank, 3)).astype(np.float32),
            rng.normal(size=(4, rank)).astype(np.float32),
            0.5,
            "alpha",
        )
        for rank, (path, (component, _)) in enumerate(places.items(), 1)
    }
    weights = {"in03": 0.5, "out00": 0.0, "base": -2.0, "mid": 9.0}
    # One layer a level: the second level begins at in03.
    done = weigh_blocks(Adapter(modules, "a.safetensors", ""), weights, base(2, 1))
    for path, (_, block) in places.items():
        own, before = done.modules[path], modules[path]
        wanted = weights.get(block, 1) * 0.5 * before.up.astype(float) @ before.down
        np.testing.assert_allclose(own.scaled_up.astype(float) @ own.down, wanted, rtol=1e-6)


WRONG = {
    "no such block": ("in4=1", "there is no block `in4`, did you mean `in04`"),
    "a length": ("1,1,1", "got 3 numbers"),
    "no number": ("in04=x", "got `x`"),
    "nan": ("mid=nan", "expected -1000 to 1000"),
    "empty": ("", "got ``"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_weight_is_named(wrong: str) -> None:
    text, said = WRONG[wrong]
    with pytest.raises(ConfigError, match=r"^block_weights: ") as error:
        parse_block_weights(text, base(4))
    assert said in str(error.value)
