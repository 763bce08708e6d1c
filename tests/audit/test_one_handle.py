"""Each file is opened once, so that what is judged is what is hashed."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from factories import write_adapter

import lora_ws.adapters.reader
from lora_ws.adapters import AdapterRef, read_adapter
from lora_ws.adapters.header import read_header
from lora_ws.audit.classify import Finding, classify_files
from lora_ws.cli import main
from lora_ws.collection import AdapterSet

Layers = tuple[tuple[str, int, int], ...]
_opened: Counter[str] = Counter()


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | Path):
        _opened[os.fsdecode(arguments[0])] += 1


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    # A hook cannot be taken away again.
    sys.addaudithook(_count)


@pytest.fixture
def opens() -> Iterator[Counter[str]]:
    """How often each path is opened in this process, by Python."""
    _opened.clear()
    yield _opened
    _opened.clear()


@pytest.fixture
def file(mini: AdapterSet, layers: Layers, tmp_path: Path) -> Path:
    return _dated(write_adapter(tmp_path / "a.safetensors", mini.weights[400], layers))


def _dated(file: Path) -> Path:
    """Clocks of file systems are coarse: two writes in a test may be of one moment."""
    os.utime(file, (1, 1))
    return file


def test_commands_open_a_file_once(
    file: Path, bundle: Path, tmp_path: Path, opens: Counter[str]
) -> None:
    cache, model = str(tmp_path / "cache"), str(bundle)
    for arguments in (
        ["predict", str(file), "--model", model],
        ["scan", str(file), "--model", model, "--cache", cache],
        ["scan", str(file), "--cache", cache],
        ["inspect", str(file)],
    ):
        opens.clear()
        assert main(arguments) == 0
        assert opens[str(file)] == 1, arguments


def test_a_known_file_is_opened_once_for_its_hash(
    file: Path, tmp_path: Path, opens: Counter[str]
) -> None:
    arguments = ["scan", str(file), "--cache", str(tmp_path / "cache")]
    assert main(arguments) == 0
    opens.clear()
    assert main(arguments) == 0
    assert opens[str(file)] == 1


def _judged(file: Path) -> Finding:
    (result,) = classify_files([AdapterRef.parse(file)])
    assert result.finding
    return result.finding


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let something happen between the header of a file and its weights."""

    def let(happen: Callable[[], object]) -> None:
        def read(*arguments, **options):
            found = read_header(*arguments, **options)
            happen()
            return found

        monkeypatch.setattr(lora_ws.adapters.reader, "read_header", read)

    return let


def test_a_file_that_is_replaced_is_judged_and_hashed_as_the_one_it_was(
    file: Path, mini: AdapterSet, layers: Layers, tmp_path: Path, meanwhile
) -> None:
    before, content = _judged(file), file.read_bytes()
    other = write_adapter(tmp_path / "other.safetensors", mini.weights[401], layers)
    meanwhile(lambda: other.replace(file) if other.exists() else None)
    finding = _judged(file)
    assert finding == before
    assert finding.sha256 == hashlib.sha256(content).hexdigest()
    # The next reader gets the other one.
    assert _judged(file).update_hash != before.update_hash


def test_an_adapter_has_the_hash_of_the_weights_that_were_read(
    file: Path, mini: AdapterSet, layers: Layers, tmp_path: Path, meanwhile
) -> None:
    content = file.read_bytes()
    other = write_adapter(tmp_path / "other.safetensors", mini.weights[401], layers)
    meanwhile(lambda: other.replace(file))
    adapter = read_adapter(file)
    assert adapter.sha256 == hashlib.sha256(content).hexdigest()
    np.testing.assert_array_equal(adapter.flat(), mini.weights[400])


def test_a_file_that_is_written_meanwhile_is_refused_and_may_be_read_again(
    file: Path, mini: AdapterSet, layers: Layers, tmp_path: Path, meanwhile
) -> None:
    other = write_adapter(tmp_path / "other.safetensors", mini.weights[401], layers)
    # Of the same length, so that only its date tells.
    assert other.stat().st_size == file.stat().st_size
    meanwhile(lambda: file.write_bytes(other.read_bytes()))
    finding = _judged(file)
    assert finding.reason == "unreadable"
    assert "being written" in finding.message
    assert finding.sha256 == ""


def test_a_file_is_let_go_of(file: Path) -> None:
    def held() -> int:
        links = Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").exists() else []
        return sum(link.exists() and link.resolve() == file.resolve() for link in links)

    with lora_ws.adapters.reader.open_adapter(file) as opened:
        opened.read()
        assert held() in (0, 1)  # 0 where the system does not tell
    assert held() == 0
    opened = lora_ws.adapters.reader.open_adapter(file)
    del opened
    assert held() == 0
    _judged(file)
    assert held() == 0
