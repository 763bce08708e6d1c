"""Names of modules against the libraries whose models have them."""

import re
from functools import cache

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as theirs
from torch import nn

from lora_ws.adapters.architectures import by_underscores, indexed, sgm_names
from lora_ws.adapters.keys import parse_key

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ADAPTED = (nn.Linear, nn.Conv2d)


@cache
def module_names(kind: str) -> tuple[str, ...]:
    with torch.device("meta"):
        if kind == "flux":
            model: nn.Module = FluxTransformer2DModel(num_layers=2, num_single_layers=2)
        else:
            model = UNet2DConditionModel(**{"sd15": SD15, "sdxl": SDXL}[kind])  # type: ignore[arg-type]
    return tuple(name for name, module in model.named_modules() if isinstance(module, ADAPTED))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux"])
def test_every_module_is_found_by_its_name_with_underscores(kind: str) -> None:
    component = "transformer" if kind == "flux" else "unet"
    table = by_underscores(component)
    for name in module_names(kind):
        assert table[name.replace(".", "_")] == name


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_kohya_names_are_read(kind: str) -> None:
    for name in module_names(kind):
        key = f"lora_unet_{name.replace('.', '_')}.lora_down.weight"
        assert parse_key(key) == ("unet", name, "down")


def test_numbers_of_sdxls_own_implementation_are_those_of_diffusers() -> None:
    names = {name.replace(".", "_") for name in module_names("sdxl")}
    original = {sgm_names()[name]: name for name in names if name in sgm_names()}
    attentions = {name for name in names if "attentions" in name}
    assert attentions <= set(original.values())
    linear = {old: new for old, new in original.items() if new in attentions}
    keys = {
        f"lora_unet_{old}.lora_{role}.weight": torch.zeros(1)
        for old in linear
        for role in ("down", "up")
    }
    config = type("Config", (), {"layers_per_block": 2})
    numbered = theirs._maybe_map_sgm_blocks_to_diffusers(keys, config)
    converted, _ = theirs._convert_non_diffusers_lora_to_diffusers(numbered)
    # It answers in names of attention processors, which have no number at the end of to_out.
    plain = [re.sub(r"\.processor\.(\w+)_lora\.", r".\1.lora.", key) for key in converted]
    plain = [key.replace(".to_out.lora", ".to_out.0.lora") for key in plain]
    mapped = {key.removeprefix("unet.").partition(".lora")[0] for key in plain}
    expected = {by_underscores("unet")[new] for new in linear.values()}
    # pytest would compare thousands of names letter by letter.
    assert not mapped ^ expected
    assert len(mapped) == len(linear)
    for old, new in original.items():
        path = parse_key(f"lora_unet_{old}.alpha")
        assert path is not None
        assert path.path.replace(".", "_") == new


def test_indexed_files_number_modules_of_their_shapes() -> None:
    """Shapes of a real file fit the modules that its numbers stand for."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**SD15)  # type: ignore[arg-type]
    names = indexed("unet")
    assert set(names) <= set(module_names("sd15"))
    assert len(set(names)) == 144
    assert model.get_submodule(names[8]).weight.shape == (320, 320)
    assert parse_key("unet:144:down") is None


MID = "mid_block.attentions.0"
TEXT = "text_model.encoder.layers.3"
SPELLINGS = {
    "lora_te_text_model_encoder_layers_3_mlp_fc2.alpha": f"{TEXT}.mlp.fc2",
    f"text_encoder.{TEXT}.self_attn.to_q_lora.down.weight": f"{TEXT}.self_attn.q_proj",
    f"text_encoder_2.{TEXT}.mlp.fc1.lora_linear_layer.up.weight": f"{TEXT}.mlp.fc1",
    "lora_unet_unet_mid_block_attentions_0_transformer_blocks_0_attn1_processor_to_k_lora_down"
    ".weight": f"{MID}.transformer_blocks.0.attn1.to_k",
    "lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight": (
        "single_transformer_blocks.0.attn.to_k"
    ),
    "diffusion_model.double_blocks.7.img_mlp.0.lora_A.weight": "transformer_blocks.7.ff.net.0.proj",
    "lycoris_mid_block_attentions_0_proj_out.lokr_w1": f"{MID}.proj_out",
    f"unet.{MID}.proj_in.lora_A.my_name.weight": f"{MID}.proj_in",
}


@pytest.mark.parametrize("key", SPELLINGS)
def test_other_spellings(key: str) -> None:
    found = parse_key(key)
    assert found is not None
    assert found.path == SPELLINGS[key]


@pytest.mark.parametrize(
    "key",
    [
        "transformer.h.0.attn.c_attn.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "lora_unet_some_thing.lora_down.weight",
        "bundle_emb.token.string_to_param.*",
        "emb_params",
        "upsample.weight",
        ".alpha",
    ],
)
def test_other_keys_are_no_parts_of_an_update(key: str) -> None:
    assert parse_key(key) is None
