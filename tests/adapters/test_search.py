"""Folders and lists of adapter files: each file once, by its own name, and nothing lost unsaid."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_ws.adapters import FoundAdapters, find_adapters
from lora_ws.adapters.locate import AdapterRef
from lora_ws.adapters.search import OTHER_KIND, SAME_FILE, SAME_FOLDER
from lora_ws.errors import AdapterError, NotAvailableError

ODD = (
    "style #2.safetensors",
    "#first.safetensors",
    "a [v1], (b) {c}.safetensors",
    "\u65e5\u672c \U0001f98a.safetensors",
    "UPPER.SafeTensors",
    "=cmd.safetensors",
    "-dash.safetensors",
    "it's.safetensors",
    "line\u2028separator.safetensors",
)
posix = pytest.mark.skipif(os.name == "nt", reason="names that Windows does not take")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.safetensors", "a/c.SAFETENSORS", "a/old.ckpt", "a/notes.md", "a/x.zip"):
        (tmp_path / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loras" / name).write_bytes(b"")
    return tmp_path / "loras"


def below(folder: Path, found: FoundAdapters) -> list[str]:
    return [Path(ref.name).relative_to(folder).as_posix() for ref in found]


def test_a_folder_gives_adapters_pickles_and_archives_in_order(folder: Path) -> None:
    found = find_adapters(str(folder))
    assert below(folder, found) == ["b.safetensors", "a/c.SAFETENSORS", "a/old.ckpt", "a/x.zip"]
    assert found.left_out == {OTHER_KIND: 1}
    assert found[1:] == found.refs[1:]


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", ["0 before.safetensors", "z after.safetensors"])
def test_a_link_is_no_second_file(
    link: Callable[[Path, Path], None], name: str, folder: Path
) -> None:
    link(folder / "b.safetensors", folder / name)
    found = find_adapters(str(folder))
    assert found.left_out[SAME_FILE] == 1
    assert len(found) == 4
    if link is os.symlink:
        assert "b.safetensors" in below(folder, found)


def test_a_link_to_a_file_elsewhere_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    (folder / "snapshot.safetensors").symlink_to(tmp_path / "blob")
    found = find_adapters(str(folder))
    assert "snapshot.safetensors" in below(folder, found)
    assert SAME_FILE not in found.left_out


def test_linked_folders_are_searched_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "d.safetensors").write_bytes(b"")
    (tmp_path / "disk" / "up").symlink_to(folder)
    (folder / "0 more").symlink_to(tmp_path / "disk")
    (folder / "again").symlink_to(tmp_path / "disk")
    (folder / "a" / "loop").symlink_to(folder)
    found = find_adapters(str(folder))
    assert below(folder, found)[-1] == "0 more/d.safetensors"
    assert len(found) == 5
    assert found.left_out[SAME_FOLDER] == 3


def test_names_that_overlap_give_each_file_once(folder: Path) -> None:
    names = (str(folder / "a"), str(folder), str(folder / "a" / ".." / "b.safetensors"))
    assert len(find_adapters(*names)) == 4


def test_a_peft_file_with_other_settings_is_another_adapter(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(
            f'{{"lora_alpha": "{name}"}}', encoding="utf-8"
        )
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "two" / "adapter_model.safetensors").symlink_to(
        tmp_path / "one" / "adapter_model.safetensors"
    )
    assert len(find_adapters(str(tmp_path))) == 2


@posix
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "quote", ["{}", '"{}"', "'{}'", "  {}\t "], ids=["bare", "double", "single", "wide"]
)
def test_a_whole_line_of_a_list_is_a_name(
    ending: str, encoding: str, quote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ODD:
        Path(name).write_bytes(b"")
    lines = ["# a remark", *map(quote.format, ODD), "", "  "]
    Path("list.txt").write_bytes(ending.join(lines).encode(encoding))
    found = find_adapters("list.txt")
    assert [ref.name for ref in found] == list(ODD)
    assert all(ref.problem is None for ref in found)


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_a_list_names_what_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    file.write_bytes(b"")
    (tmp_path / "list.txt").write_bytes(os.fsencode(file) + b"\n")
    (ref,) = find_adapters(str(tmp_path / "list.txt"))
    assert ref.file() == file
    assert ref.name.endswith("caf\\xe9.safetensors")


@pytest.mark.parametrize(
    "line",
    [
        "gone.safetensors",
        "no/such/folder/",
        "a b/c",
        "hub:",
        "nul\0byte.safetensors",
        "x" * 5000 + ".safetensors",
        "list.txt",
        "b.safetensors  # no remark",
    ],
)
def test_a_bad_line_is_a_file_that_cannot_be_opened(line: str, folder: Path) -> None:
    written = folder / "list.txt"
    good = str(folder / "b.safetensors")
    written.write_text(f"{good}\n{line}\n{folder}/a/c.SAFETENSORS\n", encoding="utf-8")
    first, bad, last = find_adapters(str(written))
    assert (first.name, last.name) == (good, f"{folder}/a/c.SAFETENSORS")
    with pytest.raises(AdapterError):
        bad.open()


def test_a_list_names_folders_and_the_hub(folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "list.txt"
    written.write_text(f"{folder / 'a'}\nhub:o/r/x.safetensors@main", encoding="utf-8")
    *inside, remote = find_adapters(str(written))
    assert len(inside) == 3
    assert (remote.repo_id, remote.filename, remote.revision) == ("o/r", "x.safetensors", "main")


@pytest.mark.parametrize("name", ["", "no/such/file.safetensors", "gone.safetensors", "a b/c"])
def test_a_name_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(AdapterError) as refused:
        find_adapters(name)
    assert refused.value.reason == "missing"


def test_addresses_of_fsspec_name_files_folders_and_repositories(
    as_hub_user: Callable[..., None], tmp_path: Path
) -> None:
    for name in ("a", "folder/b", "folder/c", "folders/d"):
        file = tmp_path / "hub/models/me/many" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    as_hub_user()
    wanted = {
        "hf://me/many": ["a", "folder/b", "folder/c", "folders/d"],
        "hf://me/many@main/folder": ["folder/b", "folder/c"],
        "hf://models/me/many/folder/": ["folder/b", "folder/c"],
        "hf://me/many@main/folder/b.safetensors": ["folder/b"],
    }
    for address, names in wanted.items():
        found = [ref.filename.removesuffix(".safetensors") for ref in find_adapters(address)]
        assert found == names, address
    ref = AdapterRef.parse("hf://me/many@main/folder/b.safetensors")
    assert ref == AdapterRef.parse("hub:me/many/folder/b.safetensors@main")
    with pytest.raises(AdapterError, match="expected a folder with adapters"):
        find_adapters("hf://me/many/nothing")
    for address in ("hf://datasets/me/many", "hf://me"):
        with pytest.raises(NotAvailableError, match="expected hf://owner/name of a model"):
            find_adapters(address)
