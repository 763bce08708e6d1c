"""Files by other people: each is read as diffusers or PEFT load it, or refused for a reason."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from factories import SHARED, shared_data
from safetensors.torch import load_file
from tolerances import EXACT, rounding
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.errors import AdapterError

# Module name -> its update.
Updates = Mapping[str, np.ndarray]
FOLDER = SHARED / "real_adapters"
TEXT = "text_encoder."


def empty(model: nn.Module) -> nn.Module:
    """Memory that nobody touches takes none."""
    return model.to_empty(device="cpu")


def unet() -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.5, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )


def text_encoder() -> nn.Module:
    """Its text encoder, without weights, below the name that files give it."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072}
    layers = {"num_hidden_layers": 12, "num_attention_heads": 12}
    whole = nn.Module()
    with torch.device("meta"):
        whole.text_model = CLIPTextModel(CLIPTextConfig(**sizes, **layers))
    return whole


def deltas(model: nn.Module, prefix: str = "") -> Updates:
    """The update of every module, by PEFT's own layers."""
    found = {}
    for name, layer in model.named_modules():
        if getattr(layer, "lora_A", None):
            (adapter,) = layer.lora_A
            found[prefix + name] = layer.get_delta_weight(adapter).detach().double().numpy()
    return found


def by_diffusers(file: Path) -> Updates:
    tensors, alphas = StableDiffusionPipeline.lora_state_dict(str(file), use_safetensors=True)
    tensors = {key: value.float() for key, value in tensors.items()}
    # Files of the first scripts say nothing of the component.
    prefix = "unet" if all(key.startswith("unet.") for key in tensors) else None
    model = empty(unet())
    model.load_lora_adapter(tensors, prefix=prefix, network_alphas=alphas)
    return deltas(model)


def by_peft(folder: Path) -> Updates:
    base = text_encoder() if "text_encoder" in folder.name else unet()
    model = peft.PeftModel.from_pretrained(empty(base), folder)
    return deltas(model.base_model.model, TEXT if "text_encoder" in folder.name else "")


def linears(model: nn.Module, *kinds: str) -> list[str]:
    """Linear layers in modules of some classes, in the order in which the model defines them."""
    return [
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if type(module).__name__ in kinds
        for inner, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def as_of_2022(names: list[str]) -> list[str]:
    """Then a block defined its feed-forward network between the two attentions."""
    stems = dict.fromkeys(name.partition(".attn1.")[0] for name in names if ".attn1." in name)
    parts = [f"{stem}.{part}." for stem in stems for part in ("attn1", "ff", "attn2")]
    return [name for part in parts for name in names if name.startswith(part)]


def by_number(file: Path) -> Updates:
    """The n-th linear layer of attention in the model's own order, as cloneofsimo counts."""
    raw, found = load_file(file), {}
    names = {
        "unet": as_of_2022(linears(unet(), "Attention", "GEGLU")),
        "text_encoder": linears(text_encoder(), "CLIPAttention"),
    }
    for component, paths in names.items():
        for number, path in enumerate(paths):
            up, down = (raw[f"{component}:{number}:{x}"].double() for x in ("up", "down"))
            found[("" if component == "unet" else TEXT) + path] = (up @ down).numpy()
    assert 2 * len(found) == sum(":" in key for key in raw)
    return found


class Row(NamedTuple):
    """What a file is to be read as."""

    oracle: Callable[[Path], Updates] | None
    modules: int = 0
    rank: int = 0
    others: tuple[str, ...] = ()
    # Of the file, or of its layout.
    refusal: str = ""


ROWS = {
    "catundchat_sd15_attnprocs_r4.safetensors": Row(by_diffusers, 128, 4),
    "catundchat_as_kohya.safetensors": Row(by_diffusers, 128, 4),
    "catundchat_bf16.safetensors": Row(by_diffusers, 128, 4),
    "catundchat_sd15_attnprocs_r4.bin": Row(None, refusal="pickle"),
    "hyper07_sd14_peft": Row(by_peft, 128, 4),
    "cloneofsimo_analog_svd_rank4.safetensors": Row(by_number, 192, 4),
    "cloneofsimo_lora_disney.safetensors": Row(by_number, 192, 1, ("<s1>", "<s2>")),
    "hansjohn819_sd15_text_encoder_peft": Row(by_peft, 24, 8, refusal="foreign"),
}


def real(name: str) -> Path:
    return shared_data("real_adapters") / name


def update(adapter: Adapter, name: str) -> np.ndarray:
    module = adapter.modules[name]
    return module.scale * module.up.astype(np.float64) @ module.down.astype(np.float64)


def test_every_file_has_a_row():
    shared_data("real_adapters")
    files = {file.name for file in FOLDER.iterdir()} - {"README.md"}
    assert files == set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.oracle])
def test_the_update_of_every_module_is_the_references(name: str):
    row, file = ROWS[name], real(name)
    adapter = read_adapter(file)
    assert row.oracle is not None
    expected = row.oracle(file)
    assert adapter.modules.keys() == expected.keys()
    assert len(expected) == row.modules
    assert {module.rank for module in adapter.modules.values()} == {row.rank}
    assert adapter.other_keys == row.others
    largest = max(np.abs(delta).max() for delta in expected.values())
    assert largest > 0
    for module, delta in expected.items():
        atol = rounding(row.rank, size=largest)
        np.testing.assert_allclose(update(adapter, module), delta, rtol=0, atol=atol)


def test_a_pickle_is_refused():
    with pytest.raises(AdapterError, match="pickled files can run code") as error:
        read_adapter(real("catundchat_sd15_attnprocs_r4.bin"))
    assert error.value.reason == ROWS["catundchat_sd15_attnprocs_r4.bin"].refusal


def test_a_text_encoder_alone_has_no_layout():
    name = "hansjohn819_sd15_text_encoder_peft"
    adapter = read_adapter(real(name))
    assert adapter.components == {"text_encoder"}
    with pytest.raises(AdapterError, match="adapts only text_encoder") as error:
        _ = adapter.layout
    assert error.value.reason == ROWS[name].refusal


def test_alpha_over_rank_stands_in_the_settings_alone():
    scales = {module.scale for module in read_adapter(real("hyper07_sd14_peft")).modules.values()}
    assert scales == {4.0}


def test_a_bfloat16_copy_differs_by_its_rounding():
    full = read_adapter(real("catundchat_sd15_attnprocs_r4.safetensors"))
    half = read_adapter(real("catundchat_bf16.safetensors"))
    nearest = torch.finfo(torch.bfloat16).eps / 2
    for name, module in full.modules.items():
        other = half.modules[name]
        np.testing.assert_allclose(other.down, module.down, rtol=nearest, atol=1e-30)
        np.testing.assert_allclose(other.up, module.up, rtol=nearest, atol=1e-30)


@pytest.mark.slow
def test_a_kohya_copy_has_the_same_update():
    first = read_adapter(real("catundchat_sd15_attnprocs_r4.safetensors"))
    kohya = read_adapter(real("catundchat_as_kohya.safetensors"))
    for name in first.modules:
        np.testing.assert_allclose(update(kohya, name), update(first, name), rtol=EXACT)
