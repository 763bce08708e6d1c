"""Reading one adapter: spellings, precisions, scales, and files that are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import SMALL, matrices, shared_data, weights, write_adapter
from safetensors.torch import load_file, save_file

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.errors import AdapterError

DOTTED = {"down": ".lora.down.weight", "up": ".lora.up.weight"}
PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
NAMED = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
PROCESSOR = {"down": "_lora.down.weight", "up": "_lora.up.weight"}
SPELLINGS = {
    "diffusers": ("unet.", DOTTED),
    "diffusers without prefix": ("", DOTTED),
    "attention processors": ("", PROCESSOR),
    "attention processors, packed": ("unet.", PROCESSOR),
    "PEFT": ("base_model.model.", PEFT),
    "PEFT with an adapter name": ("base_model.model.", NAMED),
    "PEFT of a pipeline": ("base_model.model.unet.", PEFT),
    "PEFT saved by diffusers": ("unet.", PEFT),
}
RANK = 2
FIRST = SMALL[0][0]


def factors(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    size = RANK * sum(inputs + outputs for _, inputs, outputs in SMALL)
    named = matrices(weights(1, size, seed)[0], SMALL, RANK)
    return {
        (path, role): torch.tensor(named[f"unet.{path}.lora.{role}.weight"])
        for path, *_ in SMALL
        for role in ("down", "up")
    }


def spell(spelling: str, path: str, role: str) -> str:
    prefix, suffixes = SPELLINGS[spelling]
    if suffixes is PROCESSOR:
        head, _, projection = path.rpartition(".")
        path = f"{head}.processor.{projection}"
    return f"{prefix}{path}{suffixes[role]}"


def spelt(spelling: str) -> dict[str, torch.Tensor]:
    return {spell(spelling, path, role): value for (path, role), value in factors().items()}


def update(adapter: Adapter, path: str) -> np.ndarray:
    return adapter.scale[path] * adapter.up[path].astype(np.float64) @ adapter.down[path]


def expected_update(path: str, scale: float = 1.0) -> np.ndarray:
    found = factors()
    return scale * found[path, "up"].double().numpy() @ found[path, "down"].double().numpy()


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_update(spelling: str, tmp_path: Path):
    adapter = read_adapter(write(tmp_path / "a.safetensors", spelt(spelling)))
    assert [layer.name for layer in adapter.layout.layers] == [path for path, *_ in SMALL]
    for path, *_ in SMALL:
        np.testing.assert_allclose(update(adapter, path), expected_update(path), rtol=1e-12)


def test_flat_holds_the_factors_in_column_order(tmp_path: Path):
    vector = weights(1)[0]
    adapter = read_adapter(write_adapter(tmp_path / "a.safetensors", vector))
    np.testing.assert_array_equal(adapter.flat(), vector)
    assert adapter.flat().dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_widened_exactly(dtype: torch.dtype, tmp_path: Path):
    tensors = {key: value.to(dtype) for key, value in spelt("diffusers").items()}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors))
    for path, *_ in SMALL:
        stored = tensors[spell("diffusers", path, "up")].float().numpy()
        np.testing.assert_array_equal(adapter.up[path], stored)
        assert adapter.up[path].dtype == np.float32


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 4.0), (1.0, 0.5), (0.0, 1.0)])
def test_alpha_tensor_scales_its_layer_only(alpha: float, scale: float, tmp_path: Path):
    tensors = spelt("diffusers") | {f"unet.{FIRST}.alpha": torch.tensor(alpha)}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert adapter.scale == {FIRST: scale, SMALL[1][0]: 1.0}
    up = next(m.columns for m in adapter.layout.matrices if m.name == f"{FIRST}.up")
    np.testing.assert_array_equal(adapter.flat()[up], scale * factors()[FIRST, "up"].ravel())


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8, "r": RANK}, 8 / RANK),
        ({"lora_alpha": 8, "r": RANK, "use_rslora": True}, 8 / math.sqrt(RANK)),
        ({"r": RANK}, 1.0),
    ],
)
def test_peft_folder_takes_its_scale_from_the_configuration(
    config: dict, scale: float, tmp_path: Path
):
    write(tmp_path / "adapter_model.safetensors", spelt("PEFT"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path)
    assert adapter.scale[FIRST] == pytest.approx(scale)
    np.testing.assert_allclose(update(adapter, FIRST), expected_update(FIRST, scale), rtol=1e-12)
    assert read_adapter(tmp_path / "adapter_model.safetensors").scale == adapter.scale


def test_scale_in_the_header_counts(tmp_path: Path):
    config = {"unet.lora_alpha": 16, "unet.r": RANK, "text_encoder.lora_alpha": 1}
    header = {"lora_adapter_metadata": json.dumps(config)}
    adapter = read_adapter(write(tmp_path / "a.safetensors", spelt("diffusers"), header))
    assert set(adapter.scale.values()) == {16 / RANK}


def test_configuration_beside_an_ordinary_file_does_not_count(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
    adapter = read_adapter(write(tmp_path / "a.safetensors", spelt("diffusers")))
    assert set(adapter.scale.values()) == {1.0}


def test_passengers_are_reported(tmp_path: Path):
    tensors = spelt("diffusers") | {"text_encoder.q.lora_A.weight": torch.ones(1, 2)}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert adapter.other_keys == ("text_encoder.q.lora_A.weight",)


def test_layer_named_twice_is_refused(tmp_path: Path):
    tensors = spelt("diffusers") | spelt("PEFT")
    with pytest.raises(AdapterError, match="a second time"):
        read_adapter(write(tmp_path / "a.safetensors", tensors))


def changed(key: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {k: v for k, v in spelt("diffusers").items() if k != key}
    return tensors if value is None else tensors | {key: value}


UP = f"unet.{FIRST}.lora.up.weight"
BAD_TENSORS = {
    "missing up": (changed(UP, None), "has no `up` matrix"),
    "rank mismatch": (changed(UP, torch.ones(4, 5)), "down has rank 2"),
    "convolution": (changed(UP, torch.ones(4, 2, 1, 1)), "to be a matrix"),
    "NaN": (changed(UP, torch.full((4, 2), torch.nan)), f"`{UP}` holds NaN"),
    "infinity": (changed(UP, torch.full((4, 2), -torch.inf)), f"`{UP}` holds NaN or inf"),
    "beyond float32": (changed(UP, torch.full((4, 2), 1e300, dtype=torch.double)), "NaN or inf"),
    "no tensors": ({}, "holds no tensors"),
    "text encoder only": ({"text_encoder.q.lora_A.weight": torch.ones(1)}, "only the text encoder"),
    "kohya": ({"lora_unet_mid_block_x_to_q.lora_down.weight": torch.ones(1)}, "expected diffusers"),
    "cloneofsimo": ({"unet:0:down": torch.ones(1)}, "got names such as `unet:0:down`"),
    "empty alpha": (changed(f"unet.{FIRST}.alpha", torch.ones(0)), "one number as alpha"),
    "rank beyond reason": (
        changed(UP, torch.ones(4, 5000)) | {UP.replace(".up.", ".down."): torch.ones(5000, 3)},
        "is above 4096",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_unusable_tensors_are_refused_with_the_file(case: str, tmp_path: Path):
    tensors, message = BAD_TENSORS[case]
    file = write(tmp_path / "bad one.safetensors", tensors)
    with pytest.raises(AdapterError) as error:
        read_adapter(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"
BAD_BYTES = {
    "empty": (b"", "the file is empty"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "not a readable safetensors file"),
    "LFS pointer": (POINTER.encode(), "not a readable safetensors file"),
    "zeros": (bytes(100), "not a readable safetensors file"),
    "huge header": (b"\xff" * 8 + b"{}", "not a readable safetensors file"),
    "no JSON": ((9).to_bytes(8, "little") + b"{'a': 1}x", "not a readable safetensors file"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_other_bytes_are_refused_with_the_file(case: str, tmp_path: Path):
    content, message = BAD_BYTES[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterError) as error:
        read_adapter(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_truncation_is_noticed_at_every_length(tmp_path: Path):
    whole = write(tmp_path / "a.safetensors", spelt("diffusers")).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"cut\.safetensors"):
            read_adapter(cut)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ""])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path):
    file = tmp_path / f"adapter{suffix}"
    torch.save(spelt("diffusers"), file)
    with pytest.raises(AdapterError, match="refused"):
        read_adapter(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "expected a JSON object"),
        ('{"lora_alpha": "8"}', "to be a number"),
        ('{"lora_alpha": NaN}', "to be a number"),
        ('{"lora_alpha": 8, "rank_pattern": {"to_q": 4}}', "rank_pattern"),
        ('{"lora_alpha": 8, "alpha_pattern": {"to_q": 4}}', "alpha_pattern"),
    ],
)
def test_unusable_configuration_is_named(text: str, message: str, tmp_path: Path):
    write(tmp_path / "adapter_model.safetensors", spelt("PEFT"))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(tmp_path)
    assert "adapter_config.json" in str(error.value)


@pytest.mark.parametrize("name", ["absent.safetensors", "."])
def test_nothing_there_is_said(name: str, tmp_path: Path):
    with pytest.raises(AdapterError, match="found neither"):
        read_adapter(tmp_path / name)


# Files by other people


def test_real_bfloat16_copy_agrees():
    folder = shared_data("real_adapters")
    full = read_adapter(folder / "catundchat_sd15_attnprocs_r4.safetensors")
    half = read_adapter(folder / "catundchat_bf16.safetensors")
    assert full.layout == half.layout
    assert {layer.rank for layer in full.layout.layers} == {4}
    for name in full.down:
        np.testing.assert_allclose(half.down[name], full.down[name], rtol=2**-8, atol=1e-30)
        np.testing.assert_allclose(half.up[name], full.up[name], rtol=2**-8, atol=1e-30)


def test_real_peft_folder_has_scale_four():
    folder = shared_data("real_adapters") / "hyper07_sd14_peft"
    adapter = read_adapter(folder)
    assert set(adapter.scale.values()) == {4.0}
    raw = load_file(folder / "adapter_model.safetensors")
    assert len(raw) == 2 * len(adapter.layout.layers)
    key = next(k for k in raw if k.endswith("attn1.to_q.lora_B.weight"))
    path = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    a, b = raw[key.replace("lora_B", "lora_A")].double().numpy(), raw[key].double().numpy()
    np.testing.assert_allclose(update(adapter, path), 4 * b @ a, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("catundchat_sd15_attnprocs_r4.bin", "pickled files can run code"),
        ("catundchat_as_kohya.safetensors", "expected diffusers or PEFT names"),
        ("cloneofsimo_analog_svd_rank4.safetensors", "expected diffusers or PEFT names"),
        ("cloneofsimo_lora_disney.safetensors", "expected diffusers or PEFT names"),
        ("hansjohn819_sd15_text_encoder_peft", "only the text encoder"),
    ],
)
def test_real_files_of_other_kinds_are_refused(name: str, message: str):
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(shared_data("real_adapters") / name)
    assert name in str(error.value)


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    stem = "base_model.model.mid_block.attentions.0.to_q"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(1, 3),
        f"{stem}.lora_B.weight": torch.ones(4, 1),
        f"{stem}.lora_magnitude_vector": torch.ones(4),
    }
    save_file(tensors, tmp_path / "dora.safetensors")
    with pytest.raises(AdapterError, match=r"dora\.safetensors.*DoRA"):
        read_adapter(tmp_path / "dora.safetensors")
