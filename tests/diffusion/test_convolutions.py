"""Convolutions of `AdapterBank` against peft, LyCORIS and merged weights, sample by sample."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from lycoris.modules.locon import LoConModule
from peft import LoraConfig
from safetensors.torch import save_file
from tolerances import EXACT, rounding, terms_of
from torch import Tensor, nn

from lora_ws.adapters import LayerSpec, Layout, read_adapter
from lora_ws.adapters.adapter import Module
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.errors import AdapterError, LayoutError

# Kernels of 3x3, with strides of 1 and 2, and of 1x1; a linear module beside them.
NAMES = (
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.attentions.0.proj_out",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.resnets.0.conv1",
    "up_blocks.1.resnets.0.conv_shortcut",
)
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module")
def _unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model.requires_grad_(False).eval()


@pytest.fixture
def unet(_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(_unet)


def layout_of(model: nn.Module, rank: int, names: Sequence[str] = NAMES) -> Layout:
    weights = [(name, model.get_submodule(name).get_parameter("weight")) for name in names]
    return Layout.from_layers(LayerSpec(k, w[0].numel(), len(w), rank) for k, w in weights)


def random_bank(
    model: nn.Module,
    ranks: Sequence[int],
    names: Sequence[str] = NAMES,
    dtype: torch.dtype = torch.float64,
) -> AdapterBank:
    layouts = [layout_of(model, rank, names) for rank in ranks]
    rows = [
        0.3 * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
        for seed, layout in enumerate(layouts)
    ]
    return AdapterBank(layouts, rows, dtype=dtype)


def inputs(batch: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=g).to(dtype),
        "timestep": torch.randint(0, 1000, (batch,), generator=g),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=g).to(dtype),
    }


def merged(model: nn.Module, bank: AdapterBank, scales: Tensor) -> Any:
    """A copy with updates added to its weights."""
    model = copy.deepcopy(model)
    for n, layout in enumerate(bank.layouts):
        row = bank.row(n)
        for layer, down, up in layout.pairs():
            weight = model.get_submodule(layer.name).get_parameter("weight")
            update = row[up].view(layer.up_shape) @ row[down].view(layer.down_shape)
            weight.data += scales[n] * update.view(weight.shape)
    return model


def with_peft(model: UNet2DConditionModel, bank: AdapterBank, n: int) -> UNet2DConditionModel:
    """A copy whose weights peft has merged adapter n into."""
    model, layout = copy.deepcopy(model), bank.layouts[n]
    rank = layout.layers[0].rank
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(NAMES)), "a")
    for layer, down, up in layout.pairs():
        module: Any = model.get_submodule(layer.name)
        for part, columns in ((module.lora_A["a"], down), (module.lora_B["a"], up)):
            part.to(model.dtype).weight.data.copy_(bank.row(n)[columns].view(part.weight.shape))
    model.fuse_lora()
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_sample_equals_weights_that_peft_merged(unet: Any, dtype: torch.dtype) -> None:
    unet.to(dtype=dtype)
    bank = random_bank(unet, (1, 4), dtype=dtype)
    which, call = [1, 0, 0], inputs(3, dtype)
    with torch.no_grad():
        base = unet(**call).sample
        with bank.attach(unet, torch.eye(2)[which]):
            ours = unet(**call).sample
        alone = [with_peft(unet, bank, n)(**call).sample for n in range(2)]
    theirs = torch.stack([alone[n][b] for b, n in enumerate(which)])
    size = float(base.abs().max())
    atol = EXACT if dtype == torch.float64 else rounding(terms_of(unet), size=size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert all((ours[b] - base[b]).abs().max() > 1e-2 for b in range(3))


@pytest.mark.parametrize(("rank", "tucker"), [(1, False), (4, False), (4, True)])
def test_files_of_locon_act_as_its_own_layers(
    unet: UNet2DConditionModel, rank: int, tucker: bool, tmp_path: Path
) -> None:
    torch.manual_seed(rank)
    unet.double()
    theirs, tensors = copy.deepcopy(unet), {}
    for name in NAMES:
        layer = LoConModule(
            "x", theirs.get_submodule(name), lora_dim=rank, alpha=2, use_tucker=tucker
        )
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.{k}": v.clone().contiguous() for k, v in layer.state_dict().items()}
        layer.double().apply_to()
    save_file(tensors, tmp_path / "a.safetensors")
    bank = AdapterBank.from_adapters(
        [read_adapter(tmp_path / "a.safetensors")], dtype=torch.float64
    )
    assert {layer.name for layer in bank.layout.layers} == set(NAMES)
    call = inputs(2)
    with torch.no_grad():
        base, wanted = unet(**call).sample, theirs(**call).sample
        with bank.attach(unet, [1.0]):
            ours = unet(**call).sample
    # Reading multiplies the two smaller factors of Tucker's three in float32.
    atol = rounding(terms_of(unet), size=float(wanted.abs().max())) if tucker else EXACT
    torch.testing.assert_close(ours, wanted, rtol=0, atol=atol)
    assert (ours - base).abs().max() > 1e-2


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3, stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "3x3, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "1x3, tiled": {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "circular"},
}
MIXTURES: dict[str, list[list[float]]] = {
    "one for all": [[0.5, -1.0, 0.8, 0.0, 0.0]],
    "one each": [[1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0, 2.0]],
    "two each": [[1.0, 0.5, 0, 0, 0], [0, 0, 0, 0.3, 1.0], [0, 0, 0, 0, 0]],
    "all": [[1.0, 0.5, 0.2, -0.1, 2.0], [0.3, 0.1, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_equals_merged_kernels_sample_by_sample(case: str, mixture: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, **CONVOLUTIONS[case])).double().requires_grad_(False)
    bank = random_bank(model, (1, 4, 2, 1, 4), ["0"])
    scales = torch.tensor(MIXTURES[mixture], dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, 6, 5, dtype=torch.float64)
    with bank.attach(model, scales.detach()):
        ours = model(x)
    for b in range(6):
        theirs = merged(model, bank, scales.detach()[b % len(scales)])(x[b : b + 1])[0]
        torch.testing.assert_close(ours[b], theirs, rtol=0, atol=EXACT)
    with bank.attach(model, scales):
        model(x).square().sum().backward()
    merely = scales.detach().requires_grad_(True)
    deltas = torch.stack(
        [
            bank.row(n)[up].view(layer.up_shape) @ bank.row(n)[down].view(layer.down_shape)
            for n, layout in enumerate(bank.layouts)
            for layer, down, up in layout.pairs()
        ]
    )
    conv: Any = model[0]
    for b in range(6):
        weight = conv.weight + torch.einsum("n,noi->oi", merely[b % len(merely)], deltas).view_as(
            conv.weight
        )
        conv._conv_forward(x[b : b + 1], weight, conv.bias).square().sum().backward()
    torch.testing.assert_close(scales.grad, merely.grad, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kernel", [(1, 9), (9, 1)])
def test_kernels_of_one_size_and_another_shape_are_refused(kernel: tuple[int, int]) -> None:
    factors = np.ones((2, 36), np.float32), np.ones((4, 2), np.float32)
    square, other = (
        {"0": Module("unet", "0", "locon", *factors, 1.0, "", kernel=own)}
        for own in ((3, 3), kernel)
    )
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(LayoutError, match=r"a kernel of 3x3 in this model, but a kernel of [19]x"):
        AdapterBank.from_modules([other]).modules_of(model)
    with pytest.raises(LayoutError, match="not of one base"):
        AdapterBank.from_modules([square, other])
    # Of a matrix nothing is known but its width.
    flat = {"0": replace(square["0"], kernel=())}
    assert AdapterBank.from_modules([square, flat]).modules_of(model) == [model[0]]


def test_what_cannot_be_adapted_is_named(tmp_path: Path) -> None:
    for make, says in (
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "Conv2d in 2 groups"),
        (lambda: nn.Conv3d(4, 4, 3), "`0` is a Conv3d; only nn.Linear and nn.Conv2d"),
        (lambda: nn.Conv2d(5, 4, 3), r"`0` maps 45 to 4 \(channels times kernel\) in this model"),
    ):
        model = nn.Sequential(make())
        bank = AdapterBank.fresh(Layout.from_layers([LayerSpec("0", 36, 4)]), 1)
        with pytest.raises(LayoutError, match=says), bank.attach(model, [1.0]):
            pass
    stem = "unet.mid_block.resnets.0.conv1.lora"
    shapes = {"A": (1, 4, 1, 3, 3), "B": (4, 1, 1, 1, 1)}
    tensors = {f"{stem}_{role}.weight": torch.ones(shape) for role, shape in shapes.items()}
    save_file(tensors, tmp_path / "video.safetensors")
    video = read_adapter(tmp_path / "video.safetensors")
    with pytest.raises(AdapterError, match=r"conv1` .* 3-D convolution; only 2-D"):
        AdapterBank.from_adapters([video])
    with pytest.raises(AdapterError, match="expected linear modules or 2-D convolutions"):
        AdapterBank.from_adapters([video], ignore_other=True)
