"""Tensors of a file as float32, bit for bit what safetensors and torch make of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import shared_data
from raw_safetensors import PLAIN, entry, pack, widened
from safetensors.torch import load_file, save_file

from lora_ws.adapters.header import read_header
from lora_ws.adapters.source import LocalSource
from lora_ws.adapters.tensors import read_tensors
from lora_ws.errors import AdapterError

RNG = np.random.default_rng(0)
# Every code of the narrow floats that is a number, and plain numbers of each other type.
BYTES = torch.arange(256).to(torch.uint8)
HALVES = torch.arange(65536).to(torch.uint16)
VALUES: dict[str, torch.Tensor] = {
    "float64": torch.tensor(RNG.standard_normal((5, 7))),
    "float32": torch.tensor(RNG.standard_normal((2, 3, 4)), dtype=torch.float32),
    "float32 extremes": torch.tensor([-0.0, 1e-45, 3.4028235e38, 1.1754942e-38]),
    "float16": HALVES.view(torch.float16),
    "bfloat16": HALVES.view(torch.bfloat16),
    "float8_e4m3": BYTES.view(torch.float8_e4m3fn),
    "float8_e5m2": BYTES.view(torch.float8_e5m2),
    "int64": torch.tensor([-5, 0, 2**24 + 1, 2**62]),
    "int32": torch.tensor([-(2**31), 7], dtype=torch.int32),
    "int16": torch.tensor([-3, 4], dtype=torch.int16),
    "int8": torch.tensor([[-3], [4]], dtype=torch.int8),
    "uint8": BYTES,
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(4.0),
    "nothing": torch.zeros((0, 3)),
}


def finite(values: torch.Tensor) -> torch.Tensor:
    return values[torch.isfinite(values.float())] if values.ndim == 1 else values


def read(file: Path, *names: str) -> dict[str, np.ndarray]:
    source = LocalSource(file)
    return read_tensors(source, read_header(source), names)


@pytest.mark.parametrize("case", VALUES)
def test_values_are_bit_equal_to_the_librarys(case: str, tmp_path: Path):
    file = tmp_path / "a.safetensors"
    save_file({"pad": torch.ones(3), "a": finite(VALUES[case])}, file)
    got = read(file, "a")["a"]
    expected = load_file(file)["a"].to(torch.float32).numpy()
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


def test_all_numbers_of_a_narrow_type_are_compared():
    """The reference itself: how many codes of each type are numbers, from their definitions."""
    counts = {name: finite(VALUES[name]).numel() for name in VALUES}
    assert counts["float16"] == 65536 - 2 * 1024
    assert counts["bfloat16"] == 65536 - 2 * 128
    assert counts["float8_e4m3"] == 254
    assert counts["float8_e5m2"] == 248


@pytest.mark.parametrize("dtype", [*PLAIN, "BF16", "F8_E4M3", "F8_E5M2", "BOOL"])
def test_random_bytes_become_the_references_numbers_or_are_refused(dtype: str, tmp_path: Path):
    for seed in range(20):
        data = np.random.default_rng(seed).bytes(24)
        width = int(torch.tensor([], dtype=_torch(dtype)).element_size())
        file = tmp_path / "a.safetensors"
        file.write_bytes(pack({"a": entry([24 // width], 0, 24, dtype)}, data))
        expected = widened(dtype, (24 // width,), data)
        if np.isfinite(expected).all():
            assert read(file, "a")["a"].tobytes() == expected.tobytes()
        else:
            with pytest.raises(AdapterError, match="`a` holds NaN") as caught:
                read(file, "a")
            assert caught.value.reason == "not-finite"


def _torch(dtype: str) -> torch.dtype:
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    names |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"}
    return getattr(torch, names.get(dtype) or dtype.replace("U", "uint").replace("I", "int"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_in_float32_are_refused_by_name(value: float, tmp_path: Path):
    file = tmp_path / "a.safetensors"
    bad = torch.tensor([0.0, value], dtype=torch.float64)
    save_file({"fine": torch.ones(1), "bad": bad}, file)
    assert read(file, "fine")["fine"] == 1
    with pytest.raises(AdapterError, match="`bad`") as caught:
        read(file, "fine", "bad")
    assert caught.value.reason == "not-finite"


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64", "F4"])
def test_types_that_are_not_read_are_refused_by_name(dtype: str, tmp_path: Path):
    file = tmp_path / "a.safetensors"
    size = {"C64": 16, "F4": 1}.get(dtype, 2)
    file.write_bytes(pack({"a": entry([2], 0, size, dtype)}, bytes(size)))
    with pytest.raises(AdapterError, match=f"`a` is of type {dtype}") as caught:
        read(file, "a")
    assert caught.value.reason == "dtype"


def test_tensor_that_is_not_there_is_refused(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(AdapterError, match="no tensor `b`"):
        read(file, "a", "b")


def test_only_the_bytes_of_the_tensors_are_read_and_not_copied(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(10), "c": torch.ones(1000)}, file)
    source = LocalSource(file)
    header = read_header(source)
    before = source.bytes_read
    found = read_tensors(source, header, ["b", "b"])
    assert source.bytes_read - before == 40
    bottom = found["b"]
    while isinstance(bottom, np.ndarray):
        bottom = bottom.base
    assert isinstance(bottom, bytes)
    assert not found["b"].flags.writeable


@pytest.mark.parametrize(
    "name",
    [
        "catundchat_sd15_attnprocs_r4.safetensors",
        "catundchat_bf16.safetensors",
        "cloneofsimo_lora_disney.safetensors",
        "hyper07_sd14_peft/adapter_model.safetensors",
    ],
)
def test_real_file_is_read_bit_for_bit(name: str):
    file = shared_data("real_adapters") / name
    expected = {key: v.to(torch.float32).numpy() for key, v in load_file(file).items()}
    found = read(file, *expected)
    assert list(found) == list(expected)
    for key in expected:
        assert found[key].shape == expected[key].shape
        assert found[key].tobytes() == expected[key].tobytes()
