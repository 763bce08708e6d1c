"""Adapters in another spelling or layout, against PEFT, diffusers and dense matrices."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file, save_file
from tolerances import rounding
from torch import nn

from lora_ws.adapters import Adapter, LayerSpec, Layout, read_adapter
from lora_ws.adapters.projection import project_adapter
from lora_ws.adapters.reader import open_adapter
from lora_ws.adapters.writer import FileFormat, write_adapter
from lora_ws.errors import AdapterError, ConfigError

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
MODULES = {f"{BLOCK}.attn1.to_q": (6, 8, 2), f"{BLOCK}.attn2.to_v": (768, 8, 3)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two modules of unequal rank, with a scale each."""
    torch.manual_seed(0)
    tensors = {}
    for path, (inputs, outputs, rank) in MODULES.items():
        stem = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, inputs)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(outputs, rank)
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank * 3))
    save_file(tensors, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def update(adapter: Adapter, name: str) -> np.ndarray:
    module = adapter.modules[name]
    return module.scale * module.up.astype(np.float64) @ module.down.astype(np.float64)


def bound(adapter: Adapter) -> float:
    """Absolute, of products of float32 factors: rank, scale and the factors themselves."""
    size = max(float(np.abs(update(adapter, name)).max()) for name in MODULES)
    return rounding(3 + 2, size=size)


@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya"])
def test_the_update_stays_in_every_spelling(to: FileFormat, file: Path, tmp_path: Path) -> None:
    adapter = read_adapter(file)
    written = write_adapter(adapter, tmp_path / "out", to)
    again = read_adapter(written.parent if to == "peft" else written)
    assert set(again.modules) == set(MODULES)
    for name in MODULES:
        np.testing.assert_allclose(update(again, name), update(adapter, name), atol=bound(adapter))


def test_peft_itself_loads_what_is_written(file: Path, tmp_path: Path) -> None:
    adapter = read_adapter(file)
    write_adapter(adapter, tmp_path / "out", "peft")
    net = nn.Module()
    for path, (inputs, outputs, _) in MODULES.items():
        parent = net
        *stem, last = path.split(".")
        for part in stem:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(inputs, outputs, bias=False))
    before = {name: net.get_parameter(f"{name}.weight").detach().clone() for name in MODULES}
    model = peft.PeftModel.from_pretrained(net, str(tmp_path / "out"))
    merged = model.merge_and_unload()
    for name in MODULES:
        delta = (merged.get_parameter(f"{name}.weight") - before[name]).detach()
        # The base's weights are below 1.
        atol = bound(adapter) + rounding(1)
        np.testing.assert_allclose(update(adapter, name), delta, atol=atol)


def test_diffusers_itself_reads_kohyas_spelling(file: Path, tmp_path: Path) -> None:
    adapter = read_adapter(file)
    tensors = load_file(write_adapter(adapter, tmp_path / "out", "kohya"))
    converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(tensors)
    # Alpha equals the rank, so their factor is 1.
    ups = {k: v for k, v in converted.items() if k.endswith("up.weight")}
    assert sorted(alphas.values()) == [2.0, 3.0]
    products = [
        u.double() @ converted[k.replace("up.w", "down.w")].double() for k, u in ups.items()
    ]
    norms = sorted(float(product.norm()) for product in products)
    expected = sorted(float(np.linalg.norm(update(adapter, name))) for name in MODULES)
    np.testing.assert_allclose(norms, expected, rtol=rounding(4))


def test_a_folder_in_use_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        write_adapter(read_adapter(file), file.parent, "kohya")


def layout(rank: int) -> Layout:
    shapes = [LayerSpec(n, i, o, rank) for n, (i, o, _) in MODULES.items()]
    return Layout.from_layers([*shapes, LayerSpec(f"{BLOCK}.attn1.to_v", 6, 8, rank)])


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_projection_is_the_best_of_the_layouts_rank(rank: int, file: Path) -> None:
    adapter, target = read_adapter(file), layout(rank)
    row = project_adapter(adapter, target)
    kept = whole = 0.0
    for layer, down, up in target.pairs():
        found = row.weights[up].reshape(layer.up_shape) @ row.weights[down].reshape(
            layer.down_shape
        )
        if layer.name not in MODULES:
            assert not found.any()
            continue
        u, s, v = np.linalg.svd(update(adapter, layer.name), full_matrices=False)
        np.testing.assert_allclose(found, (u[:, :rank] * s[:rank]) @ v[:rank], atol=bound(adapter))
        kept, whole = kept + (s[:rank] ** 2).sum(), whole + (s**2).sum()
    assert row.energy == pytest.approx(kept / whole)
    assert row.missing == (f"{BLOCK}.attn1.to_v",)
    assert not row.exact


def test_an_adapter_in_its_own_layout_keeps_its_numbers(file: Path) -> None:
    adapter = read_adapter(file)
    row = project_adapter(adapter, adapter.layout)
    assert row.exact
    np.testing.assert_array_equal(row.weights, adapter.flat())


def test_a_foreign_base_is_refused_by_name(file: Path) -> None:
    elsewhere = [s for s in Layout.known("tiny_sd_qv").layers if "mid_block" not in s.name]
    wider = [LayerSpec(f"{BLOCK}.attn2.to_v", 1024, 8)]
    for layers, says in ((elsewhere, "60 of 60 layers"), (wider, "maps 768 to 8")):
        with pytest.raises(AdapterError, match=says) as error:
            project_adapter(read_adapter(file), Layout.from_layers(layers))
        assert error.value.reason == "foreign"


@pytest.mark.parametrize(
    ("stem", "shape", "name"),
    [
        (f"unet.{BLOCK}.attn2.to_k", (768, 320), "SD1.x"),
        (f"unet.{BLOCK}.attn2.to_k", (1024, 320), "SD2.x"),
        (f"unet.{BLOCK}.attn2.to_v", (2048, 640), "SDXL"),
        (f"unet.{BLOCK}.attn1.to_q", (320, 320), "SD1.x or SD2.x"),
        (f"unet.{BLOCK[:-1]}7.attn1.to_q", (1280, 1280), "SDXL"),
        (f"unet.{BLOCK}.attn2.to_k", (99, 320), "unknown U-Net with a context of 99"),
        ("transformer.single_transformer_blocks.0.attn.to_q", (3072, 3072), "FLUX.1"),
        ("transformer.context_embedder", (7680, 3072), "FLUX.2 Klein 4B"),
        ("transformer.transformer_blocks.0.attn.to_q", (1536, 1536), "SD3"),
        ("transformer.transformer_blocks.0.attn.to_q", (1000, 1000), "unknown DiT"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", (1280, 1280), "CLIP-G"),
    ],
)
def test_bases_are_told_by_shapes(stem: str, shape: tuple, name: str, tmp_path: Path) -> None:
    inputs, outputs = shape
    tensors = {
        f"{stem}.lora_A.weight": torch.zeros(1, inputs),
        f"{stem}.lora_B.weight": torch.zeros(outputs, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors") as opened:
        assert name in opened.base.name
