"""Names that users give, and the files that they stand for."""

from pathlib import Path

import pytest

import lora_ws.adapters
from lora_ws.adapters import AdapterRef, find_adapters
from lora_ws.errors import AdapterError, DeprecatedName


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.safetensors", "a/c.SAFETENSORS", "a/old.ckpt", "a/notes.md", "a/x.bin"):
        (tmp_path / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loras" / name).write_bytes(b"")
    return tmp_path / "loras"


def names(what: str | Path) -> list[str]:
    return [ref.name for ref in find_adapters(str(what))]


def test_a_folder_gives_adapters_and_pickles_in_order(folder: Path) -> None:
    found = [Path(name).relative_to(folder).as_posix() for name in names(folder)]
    assert found == ["b.safetensors", "a/c.SAFETENSORS", "a/old.ckpt", "a/x.bin"]


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "a" / "loop").symlink_to(folder)
    assert len(names(folder)) == 4


def test_a_list_names_files_folders_and_the_hub(folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "list.txt"
    lines = ("# ours", f"{folder}/b.safetensors  # the first", "", str(folder / "a"))
    written.write_text(
        "\n".join((*lines, "hub:o/r/x.safetensors@main", "gone.safetensors")), encoding="utf-8"
    )
    found = list(find_adapters(str(written)))
    assert [ref.name for ref in found][-2:] == [
        "hub:o/r/x.safetensors@main",
        "gone.safetensors",
    ]
    assert len(found) == 6
    assert (found[-2].repo_id, found[-2].filename, found[-2].revision) == (
        "o/r",
        "x.safetensors",
        "main",
    )
    with pytest.raises(AdapterError, match="found neither") as refused:
        found[-1].open()
    assert refused.value.reason == "missing"


def test_a_list_in_a_list_is_a_file_and_no_adapter(tmp_path: Path) -> None:
    written = tmp_path / "list.txt"
    written.write_text(str(written), encoding="utf-8")
    (ref,) = find_adapters(str(written))
    with pytest.raises(AdapterError) as refused:
        ref.open()
    assert refused.value.reason == "pickle"


@pytest.mark.parametrize("name", ["", "no/such/file.safetensors", "gone.safetensors", "a b/c"])
def test_a_name_of_nothing_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as refused:
        names(name if name else tmp_path / name / "x")
    assert refused.value.reason == "missing"


@pytest.mark.parametrize("name", ["hub:", "hub:owner", "hub:owner/name", "hub:owner/name@main"])
def test_one_file_needs_the_name_of_a_file(name: str) -> None:
    with pytest.raises(AdapterError, match="expected a file"):
        AdapterRef.parse(name)


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
