"""Sizes of updates, against numpy on dense products."""

from typing import Any

import numpy as np
import pytest
import torch
from tolerances import rounding

from lora_ws.composition.balance import block_norms, norm_balance
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline
from lora_ws.diffusion.stack import AdapterStack


@pytest.fixture
def stack() -> AdapterStack:
    layout = adapter_layout(load_pipeline("digit-sd").unet, 3)
    rows = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
    return AdapterStack(("small", "large"), AdapterBank.from_rows(rows, layout), (0.1, -2.0))


def dense(stack: AdapterStack, k: int, block: str) -> float:
    row, total = stack.bank.rows()[k].numpy(), 0.0
    for layer, down, up in stack.bank.layout.pairs():
        if layer.name.startswith(f"{block}."):
            update = row[up].reshape(layer.up_shape) @ row[down].reshape(layer.down_shape)
            total += float(np.square(stack.scales[k] * update).sum())
    return total**0.5


def test_norms_are_those_of_dense_updates(stack: AdapterStack) -> None:
    found: dict[str, Any] = block_norms(stack)
    assert {"down_blocks.0", "mid_block", "up_blocks.1"} <= set(found)
    for block, norms in found.items():
        expected = [dense(stack, k, block) for k in range(2)]
        # Sums of squares in float32, of the entries of updates of rank 3.
        assert norms.tolist() == pytest.approx(expected, rel=rounding(3 * stack.bank.layout.size))


def test_the_map_says_how_unequal_they_are(stack: AdapterStack) -> None:
    heat = norm_balance(stack)
    small, large = heat.values[-1]
    assert small is not None
    assert large is not None
    assert heat.rows[-1] == "all blocks"
    assert f"{large / small:.1f} times" in heat.caption
