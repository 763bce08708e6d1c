"""Pickled adapters: converted in a process of their own, or refused; nothing of theirs runs."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import shared_data
from safetensors.torch import load_file

from lora_ws.adapters.pickled import convert_pickle
from lora_ws.errors import AdapterError

linux = pytest.mark.skipif("sys.platform != 'linux'", reason="memory is limited on Linux only")


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def refusal(file: Path, **limits: Any) -> str:
    """The message; nothing is left behind."""
    before = sorted(file.parent.iterdir())
    with pytest.raises(AdapterError) as caught:
        convert_pickle(file, file.with_suffix(".safetensors"), **limits)
    assert caught.value.reason == "pickle"
    assert sorted(file.parent.iterdir()) == before
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value)


@pytest.mark.slow
@linux
def test_real_pickle_becomes_safetensors_of_the_same_tensors(tmp_path: Path):
    file = shared_data("real_adapters") / "catundchat_sd15_attnprocs_r4.bin"
    out = convert_pickle(file, tmp_path / "a.safetensors")
    found = load_file(out)
    expected = torch.load(file, weights_only=True, map_location="cpu")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert list(tmp_path.iterdir()) == [out]


@linux
@pytest.mark.parametrize(
    "new_format", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["zip", "before zip"]
)
def test_nested_tensors_are_joined_by_dots_and_the_rest_is_left_out(
    new_format: bool, tmp_path: Path
):
    matrix = torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3)
    data = {"unet": {"a": matrix, "b": {"c": matrix.T}}, "step": 3, "d": matrix[0], "note": "x"}
    torch.save(data, tmp_path / "a.bin", _use_new_zipfile_serialization=new_format)
    (tmp_path / "a.safetensors").write_bytes(b"replaced")
    found = load_file(convert_pickle(tmp_path / "a.bin", tmp_path / "a.safetensors"))
    assert found.keys() == {"unet.a", "unet.b.c", "d"}
    assert torch.equal(found["unet.a"], matrix)
    assert torch.equal(found["unet.b.c"], matrix.T)
    assert torch.equal(found["d"], matrix[0])


@linux
@pytest.mark.parametrize(
    "packed", ["torch archive", pytest.param("bare pickle", marks=pytest.mark.slow)]
)
def test_code_in_a_pickle_does_not_run(packed: str, tmp_path: Path):
    trap = tmp_path / "trap"
    trap.mkdir()
    attack = Attack(trap / "sprung")
    if packed == "bare pickle":
        (tmp_path / "a.bin").write_bytes(pickle.dumps(attack))
    else:
        torch.save({"a": torch.ones(1), "b": attack}, tmp_path / "a.bin")
    assert "expected a dictionary of tensors, got UnpicklingError" in refusal(tmp_path / "a.bin")
    assert not list(trap.iterdir())
    # The trap is a good one.
    if packed == "bare pickle":
        pickle.loads((tmp_path / "a.bin").read_bytes())
        assert list(trap.iterdir())


@linux
def test_archive_that_would_grow_is_refused_before_it_is_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(30_000_000))
    assert "20 times the packed size" in refusal(tmp_path / "a.bin")


@linux
def test_file_above_the_memory_is_refused(tmp_path: Path):
    torch.save({"a": torch.ones(1_000_000)}, tmp_path / "a.bin")
    assert "raise memory_mb" in refusal(tmp_path / "a.bin", memory_mb=2)


@pytest.mark.slow
@linux
def test_memory_of_the_child_is_limited(tmp_path: Path):
    torch.save({"a": torch.ones(4_000_000)}, tmp_path / "a.bin")
    # Fits as a file, but not together with the copy that is written.
    assert "allocate memory" in refusal(tmp_path / "a.bin", memory_mb=20)


@linux
def test_time_of_the_child_is_limited(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    assert "got no end" in refusal(tmp_path / "a.bin", seconds=0.1)


def endless() -> dict[str, Any]:
    data: dict[str, Any] = {"a": torch.ones(1)}
    data["again"] = data
    return data


ODD: dict[str, tuple[Any, str]] = {
    "one number repeated without end": ({"a": torch.ones(1).expand(2**40)}, "MiB of tensors"),
    "a dictionary that holds itself": (endless(), "levels"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "sparse"),
    "no tensors": ({"a": 1}, "got none"),
    "two names that become one": (
        {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)},
        "twice there",
    ),
}


@pytest.mark.slow
@linux
@pytest.mark.parametrize("case", ODD)
def test_odd_content_is_refused(case: str, tmp_path: Path):
    data, message = ODD[case]
    torch.save(data, tmp_path / "a.bin")
    assert message in refusal(tmp_path / "a.bin")


@pytest.mark.slow
@linux
def test_what_is_no_pickle_is_refused(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"PK\x03\x04 and nothing more")
    assert "expected a dictionary of tensors" in refusal(tmp_path / "a.bin")


@pytest.mark.slow
@linux
def test_output_that_cannot_be_written_is_said(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    with pytest.raises(AdapterError) as caught:
        convert_pickle(tmp_path / "a.bin", tmp_path / "no" / "folder.safetensors")
    assert caught.value.reason == "pickle"
