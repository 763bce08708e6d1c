"""Reading one adapter: spellings, precisions, scales, and files that are refused."""

import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import SMALL, matrices, weights, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import EXACT

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.adapters.source import LocalSource
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
    module = adapter.modules[path]
    return module.scale * module.up.astype(np.float64) @ module.down


def scales(adapter: Adapter) -> dict[str, float]:
    return {name: module.scale for name, module in adapter.modules.items()}


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
        np.testing.assert_allclose(update(adapter, path), expected_update(path), rtol=EXACT)


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
        np.testing.assert_array_equal(adapter.modules[path].up, stored)
        assert adapter.modules[path].up.dtype == np.float32


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 4.0), (1.0, 0.5), (0.0, 1.0)])
def test_alpha_tensor_scales_its_layer_only(alpha: float, scale: float, tmp_path: Path):
    tensors = spelt("diffusers") | {f"unet.{FIRST}.alpha": torch.tensor(alpha)}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert scales(adapter) == {FIRST: scale, SMALL[1][0]: 1.0}
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
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = read_adapter(tmp_path)
    assert scales(adapter)[FIRST] == pytest.approx(scale)
    np.testing.assert_allclose(update(adapter, FIRST), expected_update(FIRST, scale), rtol=EXACT)
    assert scales(read_adapter(tmp_path / "adapter_model.safetensors")) == scales(adapter)


def test_scale_in_the_header_counts(tmp_path: Path):
    config = {"unet.lora_alpha": 16, "unet.r": RANK, "text_encoder.lora_alpha": 1}
    header = {"lora_adapter_metadata": json.dumps(config)}
    adapter = read_adapter(write(tmp_path / "a.safetensors", spelt("diffusers"), header))
    assert set(scales(adapter).values()) == {16 / RANK}


def test_configuration_beside_an_ordinary_file_does_not_count(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}', encoding="utf-8")
    adapter = read_adapter(write(tmp_path / "a.safetensors", spelt("diffusers")))
    assert set(scales(adapter).values()) == {1.0}


def test_passengers_are_reported(tmp_path: Path):
    stem = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    factor = {f"{stem}.lora_A.weight": torch.ones(1, 2), f"{stem}.lora_B.weight": torch.ones(3, 1)}
    tensors = spelt("diffusers") | factor | {"emb_params": torch.ones(2)}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert adapter.other_keys == ("emb_params",)
    assert adapter.beyond_layout == (stem, "emb_params")
    assert stem not in {layer.name for layer in adapter.layout.layers}


def test_some_modules_alone_are_read_as_in_the_whole_file(tmp_path: Path):
    file = write(tmp_path / "a.safetensors", spelt("diffusers"))
    whole, part = read_adapter(file), read_adapter(file, only=["*.attn2.to_v"])
    assert list(part.modules) == [SMALL[1][0]]
    np.testing.assert_array_equal(update(part, SMALL[1][0]), update(whole, SMALL[1][0]))
    with pytest.raises(AdapterError, match="none of the modules asked for") as error:
        read_adapter(file, only=["*.to_k"])
    assert error.value.reason == "foreign"


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 100_000)), max_size=8))
@settings(max_examples=100, deadline=None)
def test_ranges_come_back_in_their_order_whatever_is_read_together(pairs: list[tuple[int, int]]):
    ranges = [(min(pair), max(pair)) for pair in pairs]
    data = np.random.default_rng(0).bytes(100_000)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        found = LocalSource(file.name).read(ranges)
    assert found == [data[start:stop] for start, stop in ranges]


def test_a_part_is_not_hashed_and_the_whole_is(tmp_path: Path):
    file = write(tmp_path / "a.safetensors", spelt("diffusers"))
    assert read_adapter(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_adapter(file, only=["*.to_q"]).sha256 == ""


def test_a_remembered_header_is_held_against_every_file(tmp_path: Path):
    file = write(tmp_path / "a.safetensors", spelt("diffusers"))
    read_adapter(file)
    (tmp_path / "b.safetensors").write_bytes(file.read_bytes() + b"x")
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"b\.safetensors: .* after the header") as error:
            read_adapter(tmp_path / "b.safetensors")
        assert error.value.reason == "trailing"


def test_few_unknown_modules_are_listed_and_many_refused(tmp_path: Path):
    known = {
        f"unet.mid_block.attentions.{k}.proj_in.lora_{x}.weight": torch.ones(1, 1)
        for k in range(20)
        for x in "AB"
    }
    odd = {f"encoder.{k}.lora_{x}.weight": torch.ones(1, 1) for k in range(4) for x in "AB"}
    few = known | {key: odd[key] for key in list(odd)[:2]}
    adapter = read_adapter(write(tmp_path / "few.safetensors", few))
    assert adapter.other_keys == ("encoder.0.lora_A.weight", "encoder.0.lora_B.weight")
    with pytest.raises(AdapterError, match="17 % of its modules") as error:
        read_adapter(write(tmp_path / "many.safetensors", known | odd))
    assert error.value.reason == "unmapped"


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
    "one dimension": (changed(UP, torch.ones(4)), "a matrix or a convolution"),
    "NaN": (changed(UP, torch.full((4, 2), torch.nan)), f"`{UP}` holds NaN"),
    "infinity": (changed(UP, torch.full((4, 2), -torch.inf)), f"`{UP}` holds NaN or inf"),
    "beyond float32": (changed(UP, torch.full((4, 2), 1e300, dtype=torch.double)), "NaN or inf"),
    "no tensors": ({}, "expected tensors of a LoRA adapter, none"),
    "another model": ({"h.0.attn.lora_A.weight": torch.ones(1)}, "100 % of its modules"),
    "no adapter": ({"h.0.attn.weight": torch.ones(1)}, "names such as `h.0.attn.weight`"),
    "half of a convolution": (
        {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 2, 3, 3)},
        "has no `up` matrix",
    ),
    "no width": (changed(UP, torch.ones(0, 2)), "has a side of length 0"),
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
    "empty": (b"", "empty"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "html"),
    "LFS pointer": (POINTER.encode(), "lfs-pointer"),
    "zeros": (bytes(100), "unreadable"),
    "huge header": (b"\xff" * 8 + b"{}", "too-large"),
    "no JSON": ((9).to_bytes(8, "little") + b"{'a': 1}x", "header"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_other_bytes_are_refused_with_the_file(case: str, tmp_path: Path):
    content, reason = BAD_BYTES[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterError) as error:
        read_adapter(file)
    assert str(error.value).startswith(f"{file}: ")
    assert error.value.reason == reason


def test_truncation_is_noticed_at_every_length(tmp_path: Path):
    whole = write(tmp_path / "a.safetensors", spelt("diffusers")).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"cut\.safetensors"):
            read_adapter(cut)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
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
        ('{"lora_alpha": 8, "alpha_pattern": {"to_q": "4"}}', "`to_q` to be a number"),
        ('{"lora_alpha": 8, "alpha_pattern": [4]}', "`alpha_pattern` to be an object"),
    ],
)
def test_unusable_configuration_is_named(text: str, message: str, tmp_path: Path):
    write(tmp_path / "adapter_model.safetensors", spelt("PEFT"))
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(tmp_path)
    assert "adapter_config.json" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.safetensors", "found nothing there"), (".", "got another folder; .*lora-ws scan")],
)
def test_what_is_no_adapter_is_named(name: str, message: str, tmp_path: Path):
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / name)
