"""Names of makers' own repositories, against diffusers' conversions of checkpoints and adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.numpy import save_file

from lora_ws.adapters import read_adapter
from lora_ws.adapters.bases import may_be
from lora_ws.adapters.reader import open_adapter

WIDTH = 8
# Of a block of SD3 that has both attentions: name -> outputs.
JOINT = {
    f"{side}.{name}": WIDTH * times
    for side in ("x_block", "context_block")
    for name, times in {
        "attn.qkv": 3,
        "attn.proj": 1,
        "attn2.qkv": 3,
        "attn2.proj": 1,
        "mlp.fc1": 4,
        "mlp.fc2": 1,
        "adaLN_modulation.1": 6,
    }.items()
    if (side, name[:5]) != ("context_block", "attn2")
}
# What the last block of SD3 lacks.
NOT_LAST = ("context_block.attn.proj", "context_block.mlp.fc1", "context_block.mlp.fc2")
# Of HunyuanVideo, whose width diffusers takes for granted.
HUNYUAN = {
    "double_blocks.3.img_attn_qkv": 3 * 3072,
    "double_blocks.3.img_attn_proj": 3072,
    "double_blocks.3.img_mlp.fc1": 4 * 3072,
    "double_blocks.3.img_mlp.fc2": 3072,
    "double_blocks.3.img_mod.linear": 6 * 3072,
    "double_blocks.3.txt_attn_qkv": 3 * 3072,
    "double_blocks.3.txt_attn_proj": 3072,
    "double_blocks.3.txt_mlp.fc1": 4 * 3072,
    "double_blocks.3.txt_mlp.fc2": 3072,
    "double_blocks.3.txt_mod.linear": 6 * 3072,
    "single_blocks.7.linear1": 7 * 3072,
    "single_blocks.7.linear2": 3072,
    "single_blocks.7.modulation.linear": 3 * 3072,
}
# What stands beside the blocks: name -> outputs.
BESIDE_SD3 = {
    "x_embedder.proj": WIDTH,
    "context_embedder": WIDTH,
    **{f"{name}_embedder.mlp.{k}": WIDTH for name in "ty" for k in (0, 2)},
    "final_layer.linear": 4,
    "final_layer.adaLN_modulation.1": 2 * WIDTH,
}
BESIDE_HUNYUAN = {
    "img_in.proj": WIDTH,
    **{f"{name}_in.mlp.{k}": WIDTH for name in ("time", "guidance") for k in (0, 2)},
    **{f"vector_in.{name}_layer": WIDTH for name in ("in", "out")},
    "txt_in.input_embedder": WIDTH,
    **{f"txt_in.t_embedder.mlp.{k}": WIDTH for k in (0, 2)},
    **{f"txt_in.c_embedder.linear_{k}": WIDTH for k in (1, 2)},
    **{
        f"txt_in.individual_token_refiner.blocks.{k}.{name}": WIDTH * times
        for k in range(2)
        for name, times in {
            "self_attn_qkv": 3,
            "self_attn_proj": 1,
            "mlp.fc1": 4,
            "mlp.fc2": 1,
            "adaLN_modulation.1": 2,
        }.items()
    },
    "final_layer.linear": 4,
    "final_layer.adaLN_modulation.1": 2 * WIDTH,
}
SPELLINGS = ("diffusion_model.{}", "transformer.{}", "model.diffusion_model.{}", "lora_unet_{}")
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def drawn(widths: dict[str, tuple[int, int]]) -> Pairs:
    draw = np.random.default_rng(0).standard_normal
    return {
        path: (draw((1, inputs), np.float32), draw((outputs, 1), np.float32))
        for path, (outputs, inputs) in widths.items()
    }


def written(pairs: Pairs, spelling: str, file: Path) -> Path:
    kohya = spelling.endswith("_{}")
    ends = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    tensors = {}
    for path, pair in pairs.items():
        stem = spelling.format(path.replace(".", "_") if kohya else path)
        tensors |= {f"{stem}.{end}.weight": side for end, side in zip(ends, pair, strict=True)}
    save_file(tensors, file)
    return file


def updates(file: Path) -> dict[str, np.ndarray]:
    return {name: m.scaled_up @ m.down for name, m in read_adapter(file).modules.items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, update in found.items():
        np.testing.assert_array_equal(update, expected[name], name)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_sd3_is_read_as_diffusers_converts_its_checkpoint(spelling: str, tmp_path: Path) -> None:
    widths = {}
    for block in range(3):
        for name, outputs in JOINT.items():
            if block < 2 or name not in NOT_LAST:
                last = block == 2 and name == "context_block.adaLN_modulation.1"
                widths[f"joint_blocks.{block}.{name}"] = (2 * WIDTH if last else outputs, WIDTH)
    pairs = drawn(widths | {name: (outputs, WIDTH) for name, outputs in BESIDE_SD3.items()})
    found = updates(written(pairs, spelling, tmp_path / "a.safetensors"))
    weights = {path: up @ down for path, (down, up) in pairs.items()}
    # A conversion of checkpoints takes what adapters need not have.
    state = {f"{path}.weight": torch.from_numpy(weight) for path, weight in weights.items()}
    state |= {f"{path}.bias": torch.zeros(len(weight)) for path, weight in weights.items()}
    state["pos_embed"] = torch.zeros(1)
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    theirs = {
        key.removesuffix(".weight"): value.numpy()
        for key, value in converted.items()
        if key.endswith(".weight")
    }
    assert_equal(found, theirs)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_hunyuan_video_is_read_as_diffusers_converts_its_adapters(
    spelling: str, tmp_path: Path
) -> None:
    inputs = {"img_mlp.fc2": 4 * 3072, "txt_mlp.fc2": 4 * 3072, "linear2": 5 * 3072}
    pairs = drawn(
        {
            path: (outputs, next((n for end, n in inputs.items() if path.endswith(end)), 3072))
            for path, outputs in HUNYUAN.items()
        }
    )
    modules = read_adapter(written(pairs, spelling, tmp_path / "a.safetensors")).modules
    state = {
        f"{path}.lora_{letter}.weight": torch.from_numpy(side)
        for path, pair in pairs.items()
        for letter, side in zip("AB", pair, strict=True)
    }
    theirs = lora_conversion_utils._convert_hunyuan_video_lora_to_diffusers(state)
    ours = {
        f"transformer.{name}.lora_{letter}.weight": side
        for name, module in modules.items()
        for letter, side in zip("AB", (module.down, module.scaled_up), strict=True)
    }
    assert_equal(ours, {key: value.numpy() for key, value in theirs.items()})


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_hunyuan_videos_embedders_and_refiner_are_read_as_diffusers_converts_its_checkpoint(
    spelling: str, tmp_path: Path
) -> None:
    pairs = drawn({name: (outputs, WIDTH) for name, outputs in BESIDE_HUNYUAN.items()})
    block = drawn({"double_blocks.0.img_attn_proj": (WIDTH, WIDTH)})
    found = updates(written(pairs | block, spelling, tmp_path / "a.safetensors"))
    state = {
        f"{path}.weight": torch.from_numpy(up @ down)
        for path, (down, up) in (pairs | block).items()
    }
    converted = single_file_utils.convert_hunyuan_video_transformer_to_diffusers(state)
    theirs = {key.removesuffix(".weight"): value.numpy() for key, value in converted.items()}
    assert_equal(found, theirs)


@pytest.mark.parametrize(
    ("path", "blocks", "outputs", "inputs", "expected"),
    [
        ("joint_blocks.{}.x_block.attn.qkv", 24, 3 * 1536, 1536, "SD3"),
        ("joint_blocks.{}.x_block.attn.qkv", 38, 3 * 2432, 2432, "SD3"),
        ("joint_blocks.{}.x_block.attn.qkv", 1, 3 * 64, 64, "SD3"),
        ("double_blocks.{}.img_mod.linear", 20, 6 * 3072, 3072, "HunyuanVideo"),
    ],
)
def test_their_bases(
    path: str, blocks: int, outputs: int, inputs: int, expected: str, tmp_path: Path
) -> None:
    pairs = drawn({path.format(k): (outputs, inputs) for k in range(blocks)})
    with open_adapter(written(pairs, "diffusion_model.{}", tmp_path / "a.safetensors")) as file:
        assert may_be(file.base.name, [expected])
        assert not may_be(file.base.name, ["FLUX.1"])
        assert not file.structure.unmapped
