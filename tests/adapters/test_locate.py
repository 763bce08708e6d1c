"""Names that users give, and the files that they stand for."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_ws.adapters
from lora_ws.adapters import AdapterRef, find_adapters, open_adapter
from lora_ws.errors import AdapterError, DeprecatedName


@pytest.mark.parametrize("name", ["hub:", "hub:owner", "hub:owner/name", "hub:owner/name@main"])
def test_one_file_needs_the_name_of_a_file(name: str) -> None:
    with pytest.raises(AdapterError, match="expected a file"):
        AdapterRef.parse(name)


@pytest.mark.parametrize("suffix", [".zip", ".7z", ".RAR", ".tar.gz", ".tgz"])
def test_an_archive_is_refused_as_one(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(AdapterError, match="unpack it") as refused:
        AdapterRef.parse(file).open()
    assert refused.value.reason == "archive"


@pytest.mark.parametrize("suffix", ["bin", "pt", "safetensors"])
def test_a_pointer_of_git_lfs_is_refused_as_one(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(AdapterError) as refused:
        open_adapter(file)
    assert refused.value.reason == "lfs-pointer"


@pytest.mark.parametrize("suffix", ["", ".txt", ".sft"])
def test_files_of_other_names_are_what_they_hold(suffix: str, tmp_path: Path) -> None:
    """A cache of the Hub names files by their hashes."""
    file = tmp_path / f"0123abcd{suffix}"
    stem = "unet.mid_block.attentions.0.proj_in.lora"
    tensors = {f"{stem}_A.weight": np.ones((1, 8)), f"{stem}_B.weight": np.ones((8, 1))}
    save_file(tensors, file)
    assert len(open_adapter(file).structure.entries) == 1
    for content, reason in ((b"a list\n", "unreadable"), (b"\x80\x02}q\x00.", "pickle")):
        file.write_bytes(content)
        with pytest.raises(AdapterError) as refused:
            open_adapter(file)
        assert refused.value.reason == reason


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "zip"])
def test_pipes_and_sockets_are_refused_unopened(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    with socket.socket(socket.AF_UNIX) as bound:
        # The whole path may be longer than sockets' names can be.
        monkeypatch.chdir(tmp_path)
        bound.bind(f"socket.{suffix}")
    for kind in ("pipe", "socket"):
        with pytest.raises(AdapterError, match=f"got a {kind}") as refused:
            open_adapter(tmp_path / f"{kind}.{suffix}")
        assert refused.value.reason == "not-a-file"


@pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt", "pth", "pkl"])
def test_a_pickle_is_refused_unopened(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(AdapterError, match="--allow_pickle") as refused:
        AdapterRef.parse(file).open()
    assert refused.value.reason == "pickle"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Place", AdapterRef),
        ("find_places", find_adapters),
        ("place_of", AdapterRef.parse),
    ],
)
def test_old_names_still_work_and_say_the_new_ones(old: str, new: object):
    with pytest.warns(DeprecatedName, match=r"use `lora_ws\.adapters\.(AdapterRef|find_adapters)"):
        assert getattr(lora_ws.adapters, old) == new
    with pytest.raises(AttributeError, match="no attribute `Places`"):
        _ = lora_ws.adapters.Places
