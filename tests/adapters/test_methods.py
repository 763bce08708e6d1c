"""Updates of every method against the libraries that apply them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from tolerances import rounding
from torch import nn

from lora_ws.adapters import read_adapter
from lora_ws.adapters.adapter import Module
from lora_ws.errors import AdapterError

STEM = "lora_unet_mid_block_attentions_0_proj_in"
NAME = "mid_block.attentions.0.proj_in"


def dense(module: Module) -> np.ndarray:
    """The update, formed."""
    return module.scale * module.up.astype(np.float64) @ module.down.astype(np.float64)


def linear() -> nn.Module:
    return nn.Linear(12, 18, bias=False)


def convolution() -> nn.Module:
    return nn.Conv2d(6, 9, 3, padding=1, bias=False)


CASES: dict[str, tuple[type, Callable[[], nn.Module], dict[str, Any]]] = {
    "LoRA": (LoConModule, linear, {}),
    "LoRA, alpha of the square root": (LoConModule, linear, {"rs_lora": True}),
    "LoCon": (LoConModule, convolution, {}),
    "LoCon, Tucker": (LoConModule, convolution, {"use_tucker": True}),
    "LoHa": (LohaModule, linear, {}),
    "LoHa of a convolution": (LohaModule, convolution, {}),
    "LoHa, Tucker": (LohaModule, convolution, {"use_tucker": True}),
    "LoKr": (LokrModule, linear, {"factor": 3}),
    "LoKr, both sides in factors": (LokrModule, linear, {"factor": 3, "decompose_both": True}),
    "LoKr of whole matrices": (LokrModule, linear, {"factor": 3, "full_matrix": True}),
    "LoKr of a convolution": (LokrModule, convolution, {"factor": 3}),
    "LoKr, Tucker": (LokrModule, convolution, {"factor": 3, "use_tucker": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_lycoris_own_layers_do_the_same(case: str, tmp_path: Path) -> None:
    kind, make, options = CASES[case]
    torch.manual_seed(0)
    base = make()
    layer = kind("x", base, lora_dim=2, alpha=3.0, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    tensors = {f"{STEM}.{key}": v.contiguous() for key, v in layer.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    module = read_adapter(tmp_path / "a.safetensors").modules[NAME]
    layer.apply_to()
    weight = base.weight.detach()
    if isinstance(base, nn.Conv2d):
        # Inputs that hold a single 1 give back the kernel, turned over.
        x = torch.zeros(base.in_channels * 9, base.in_channels, 3, 3)
        x.view(len(x), -1).fill_diagonal_(1.0)
        centre = layer(nn.functional.pad(x, (1, 1, 1, 1)))[:, :, 2, 2] * 0
        delta = layer(x) - nn.functional.conv2d(x, weight, padding=1)
        expected = delta[:, :, 1, 1].T + centre.T
    else:
        expected = (layer(torch.eye(12)) - torch.eye(12) @ weight.T).T
    # Theirs is a difference of sums over the inputs.
    size = float((expected.abs().max() + weight.abs().max()).detach())
    atol = rounding(weight[0].numel(), size=size)
    np.testing.assert_allclose(dense(module), expected.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_peft_merges_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    """Ranks and alphas by pattern, and both places of the configuration."""
    torch.manual_seed(0)
    net = nn.Module()
    net.mid_block = nn.ModuleDict({"to_q": nn.Linear(8, 6), "to_v": nn.Linear(8, 6)})  # type: ignore[assignment]
    net.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(5, 7)})])  # type: ignore[assignment]
    before = {n: m.weight.detach().clone() for n, m in net.named_modules() if hasattr(m, "weight")}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["to_q", "to_v"],
        rank_pattern={"mid_block.to_v": 2},
        alpha_pattern={"down_blocks.0.to_q": 3, "to_v": 5},
        init_lora_weights=False,
        **options,
    )
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    merged = model.merge_and_unload()
    assert set(adapter.modules) == set(before)
    for name, module in adapter.modules.items():
        delta = (merged.get_submodule(name).weight - before[name]).detach()
        # A difference of weights, of products of rank 4 at most.
        size = float(delta.abs().max() + before[name].abs().max())
        np.testing.assert_allclose(dense(module), delta, rtol=0, atol=rounding(4, size=size))
        assert module.scale_source == "adapter_config.json"


def flux(keys: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: torch.randn(shape) for key, shape in keys.items()}


W, M = 12, 48
KOHYA = {
    "lora_unet_double_blocks_0_img_attn_qkv": (W, 3 * W),
    "lora_unet_double_blocks_0_txt_attn_qkv": (W, 3 * W),
    "lora_unet_double_blocks_0_img_attn_proj": (W, W),
    "lora_unet_double_blocks_0_txt_mlp_2": (M, W),
    "lora_unet_double_blocks_0_img_mod_lin": (W, 6 * W),
    "lora_unet_single_blocks_0_linear1": (W, 3 * W + M),
    "lora_unet_single_blocks_0_linear2": (W + M, W),
    "lora_unet_single_blocks_0_modulation_lin": (W, 3 * W),
}


@pytest.mark.slow
def test_kohyas_flux_is_what_diffusers_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The width of the real model is written into their converter.
    tensors = {}
    for stem, (inputs, outputs) in KOHYA.items():
        real = {"linear1": (3072, 21504), "linear2": (15360, 3072)}.get(stem.rpartition("_")[2])
        inputs, outputs = real or (inputs, outputs)
        tensors |= {f"{stem}.lora_down.weight": torch.randn(2, inputs)}
        tensors |= {f"{stem}.lora_up.weight": torch.randn(outputs, 2)}
        tensors |= {f"{stem}.alpha": torch.tensor(1.0)}
    check_against(tensors, theirs._convert_kohya_flux_lora_to_diffusers, tmp_path)


XLABS = {
    "double_blocks.0.processor.qkv_lora1": (W, 3 * W),
    "double_blocks.0.processor.qkv_lora2": (W, 3 * W),
    "double_blocks.0.processor.proj_lora1": (W, W),
    "double_blocks.0.processor.proj_lora2": (W, W),
    "single_blocks.0.processor.qkv_lora": (W, 3 * W),
    "single_blocks.0.processor.proj_lora": (W, W),
}


def test_xlabs_flux_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    tensors = {}
    for stem, (inputs, outputs) in XLABS.items():
        tensors |= flux({f"{stem}.down.weight": (2, inputs), f"{stem}.up.weight": (outputs, 2)})
    check_against(tensors, theirs._convert_xlabs_flux_lora_to_diffusers, tmp_path)


def check_against(tensors: dict[str, torch.Tensor], convert: Callable, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    converted = convert(dict(tensors))
    adapter = read_adapter(tmp_path / "a.safetensors")
    names = {k.removeprefix("transformer.").rpartition(".lora_")[0] for k in converted}
    assert set(adapter.modules) == names
    for name, module in adapter.modules.items():
        a, b = (converted[f"transformer.{name}.lora_{x}.weight"].double() for x in "AB")
        # The scale is folded into float32 factors.
        atol = rounding(4, size=float((b.abs() @ a.abs()).max()))
        np.testing.assert_allclose(dense(module), b @ a, rtol=0, atol=atol)


def test_dora_is_read_as_a_direction_and_flagged(tmp_path: Path) -> None:
    tensors = {
        f"{STEM}.lora_down.weight": torch.randn(2, 4),
        f"{STEM}.lora_up.weight": torch.randn(3, 2),
        f"{STEM}.dora_scale": torch.ones(3, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.modules[NAME].needs_base
    assert adapter.other_keys == (f"{STEM}.dora_scale",)


def test_rotations_are_refused_by_their_reason(tmp_path: Path) -> None:
    save_file({f"{STEM}.oft_blocks": torch.zeros(2, 3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="are of OFT") as error:
        read_adapter(tmp_path / "a.safetensors")
    assert error.value.reason == "needs-base"
