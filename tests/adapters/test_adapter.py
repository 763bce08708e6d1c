"""Rows of a layout against factors laid out by hand."""

import numpy as np
import pytest

from lora_ws.adapters import Adapter, LayerSpec, Layout, Module
from lora_ws.adapters.adapter import lay_out
from lora_ws.adapters.projection import project_adapter
from lora_ws.errors import LayoutError

A10, A2 = "down_blocks.10.to_q", "down_blocks.2.to_q"


def module(name: str, inputs: int, outputs: int, rank: int, scale: float = 1.0) -> Module:
    rng = np.random.default_rng(len(name) + inputs)
    down = rng.standard_normal((rank, inputs)).astype(np.float32)
    up = rng.standard_normal((outputs, rank)).astype(np.float32)
    return Module("unet", name, "lora", down, up, scale, "test")


@pytest.fixture
def adapter() -> Adapter:
    """Ranks 1 and 2, in another order than a layout's; the scale 0.5 is exact in float32."""
    modules = {A10: module(A10, 4, 3, 2, scale=0.5), A2: module(A2, 5, 2, 1)}
    return Adapter(modules, "a.safetensors", "")


def by_hand(adapter: Adapter, names: list[str]) -> np.ndarray:
    parts = [
        part
        for name in names
        for part in (
            adapter.modules[name].down,
            adapter.modules[name].scale * adapter.modules[name].up,
        )
    ]
    return np.concatenate([part.reshape(-1) for part in parts])


def test_a_row_is_the_factors_in_the_layouts_order_with_the_scale_in_b(adapter: Adapter) -> None:
    row = adapter.row(adapter.layout)
    assert row.dtype == np.float32
    np.testing.assert_array_equal(row, by_hand(adapter, [A2, A10]))
    np.testing.assert_array_equal(adapter.flat(), row)
    np.testing.assert_array_equal(project_adapter(adapter, adapter.layout).weights, row)


def test_layers_without_a_module_are_zeros_and_other_modules_are_left_out(adapter: Adapter) -> None:
    own = {layer.name: layer for layer in adapter.layout.layers}
    layout = Layout.from_layers([LayerSpec("a", 2, 2, 3), own[A10]])
    row = adapter.row(layout)
    expected = np.concatenate([np.zeros(12), by_hand(adapter, [A10])])
    np.testing.assert_array_equal(row, expected)


def test_a_module_of_another_shape_is_refused(adapter: Adapter) -> None:
    for wrong in (LayerSpec(A2, 5, 2, 2), LayerSpec(A2, 6, 2, 1), LayerSpec(A2, 5, 3, 1)):
        with pytest.raises(LayoutError, match=r"expected factors .*got \(1, 5\) and \(2, 1\)"):
            lay_out(adapter.linear, Layout.from_layers([wrong]))


def test_adapters_and_modules_print_as_a_line(adapter: Adapter) -> None:
    assert repr(adapter) == "Adapter(a.safetensors: lora, 2 modules of unet, ranks 1 to 2)"
    shown = "Module(unet down_blocks.10.to_q: lora, rank 2, 4 -> 3, scale 0.5)"
    assert repr(adapter.modules[A10]) == shown
