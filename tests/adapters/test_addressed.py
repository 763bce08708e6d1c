"""Adapter files at addresses of fsspec: settings beside them, and what is refused."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lora_ws.adapters import AdapterRef, open_adapter
from lora_ws.addresses import beside, file_system, is_address, path_of
from lora_ws.errors import AdapterError, NotAvailableError


def test_settings_beside_a_peft_file_are_read() -> None:
    folder = Path(__file__).parents[1].parent / "lora_ws/_assets/digit_testbed"
    file = next(folder.glob("*.safetensors"))
    store = MemoryFileSystem()
    store.pipe("/peft/adapter_model.safetensors", file.read_bytes())
    address = "memory://peft/adapter_model.safetensors"
    with open_adapter(address) as opened:
        assert opened.config is None
    store.pipe("/peft/adapter_config.json", b'{"r": 4, "lora_alpha": 8}')
    with open_adapter(address) as opened, open_adapter(file) as plain:
        assert opened.config == '{"r": 4, "lora_alpha": 8}'
        assert opened.read().layout == plain.read().layout
    store.rm("/peft", recursive=True)


def test_other_kinds_and_places_are_refused_in_one_line() -> None:
    for name, said in {
        "memory://a.zip": "got an archive",
        "https://host/a.bin?safetensors": "got `.bin`",
        "nothing://a.safetensors": "cannot be read",
        "zip://a.safetensors::memory://b.safetensors": "expected one address",
    }.items():
        with pytest.raises((AdapterError, NotAvailableError), match=re.escape(said)):
            open_adapter(name)
    with pytest.raises(AdapterError, match="expected a file on this machine; download it"):
        AdapterRef.parse("memory://a.safetensors").file()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == "s3fs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # What fsspec found once, it does not look for again; its module is hidden by its own list.
    known = vars(importlib.import_module("fsspec.registry"))["_registry"]
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(NotAvailableError, match=r"needs a package: pip install 'lora_ws\[s3\]'"):
        file_system("s3://bucket/a")


def test_parts_of_addresses() -> None:
    assert [is_address(x) for x in ("s3://a", "hub:a/b", "C:\\a", "a/b", None)] == [
        True,
        *[False] * 4,
    ]
    assert path_of("s3://bucket/a?b#c.bin") == "bucket/a?b#c.bin"
    assert beside("s3://bucket/f/a.bin", "b") == "s3://bucket/f/b"
