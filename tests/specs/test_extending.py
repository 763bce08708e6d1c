"""The examples of docs/extending.md run, and the places it names exist."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import EXACT

from lora_ws.adapters import Layout
from lora_ws.models import InputSpec

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "extending"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, found)
    return found


def test_the_representation_of_the_example_runs(names: dict[str, Any]) -> None:
    layout = Layout.known("tiny_sd_qv")
    rows = np.random.default_rng(0).standard_normal((5, layout.size))
    made = names["RowMax"](layout=layout).fit(rows)
    first = layout.matrices[0]
    expected = np.abs(rows[:, first.columns]).max(axis=1)
    np.testing.assert_array_equal(made.transform(rows)[:, 0], expected)
    assert made.get_feature_names_out()[0] == f"{first.name}.max"


def test_the_network_of_the_example_has_its_symmetry(names: dict[str, Any]) -> None:
    layout = Layout.unet_qv(widths=(4, 6, 6, 6), context=5, rank=2)
    network = names["Sizes"](width=8).build(InputSpec.of(layout), outputs=3).double()
    rows = torch.randn(4, layout.size, dtype=torch.float64)
    turned = rows.clone()
    for layer, down, up in layout.pairs():
        mix = torch.randn(2, 2, dtype=torch.float64) + 3 * torch.eye(2, dtype=torch.float64)
        turned[:, up] = (rows[:, up].view(4, *layer.up_shape) @ mix).flatten(1)
        turned[:, down] = (mix.inverse() @ rows[:, down].view(4, *layer.down_shape)).flatten(1)
    assert network(rows).shape == (4, 3)
    torch.testing.assert_close(network(turned), network(rows), rtol=EXACT, atol=EXACT)
    assert not torch.allclose(network(2 * rows), network(rows))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:lora_ws|tests)/[\w/]+\.py)", TEXT))))
def test_every_place_exists(path: str) -> None:
    assert (ROOT / path).is_file()
