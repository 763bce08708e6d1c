"""The remote reader behind olah, a Hub proxy written by others: a server to us, a client of ours.

olah needs an older psutil than the development tools, so it is no dependency: install it in an
environment of its own and put its ``olah-cli`` on the PATH.
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from lora_ws.adapters.header import read_header
from lora_ws.adapters.remote import HubSource, list_adapters
from lora_ws.adapters.tensors import read_tensors

REPO, FILE = "tester/adapters", "large.safetensors"
OLAH = shutil.which("olah-cli")
pytestmark = pytest.mark.skipif(OLAH is None, reason="needs `olah-cli` on the PATH")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "models" / REPO
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {f"{k:02d}": rng.standard_normal((50, 500), dtype=np.float32) for k in range(60)}
    save_file(tensors, folder / FILE)
    return folder / FILE


@pytest.fixture(scope="module")
def olah(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an olah in front of a Hub of ours."""
    assert OLAH is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("olah")
    with HubServer(file.parents[3]) as server:
        netloc = server.url.removeprefix("http://")
        options = {"host": "127.0.0.1", "port": port, "repos-path": folder, "log-path": folder}
        options |= {"hf-scheme": "http", "hf-netloc": netloc, "hf-lfs-netloc": netloc}
        options |= {"mirror-scheme": "http", "mirror-netloc": f"127.0.0.1:{port}"}
        options |= {"mirror-lfs-netloc": f"127.0.0.1:{port}"}
        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        with (folder / "output").open("wb") as output:
            child = subprocess.Popen([OLAH, *arguments], cwd=folder, stdout=output, stderr=output)
        try:
            wait_for(port, child)
            yield f"http://127.0.0.1:{port}"
        finally:
            child.terminate()
            child.wait()


def wait_for(port: int, child: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert child.poll() is None, "olah ended"
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("olah does not listen")


@pytest.mark.parametrize("whole_below", [0, 10**9])
def test_file_is_read_bit_for_bit_behind_olah(
    whole_below: int, olah: str, file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ENDPOINT", olah)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    source = HubSource(REPO, FILE, whole_below=whole_below)
    header = read_header(source)
    found = read_tensors(source, header, header.tensors)
    expected = load_file(file)
    assert found.keys() == expected.keys()
    assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)


def test_one_tensor_moves_few_bytes_behind_olah(
    olah: str, file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ENDPOINT", olah)
    source = HubSource(REPO, FILE)
    found = read_tensors(source, read_header(source), ["40"])
    assert found["40"].tobytes() == load_file(file)["40"].tobytes()
    assert source.bytes_read < source.size / 20


def test_files_are_listed_behind_olah(olah: str, file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", olah)
    (found,) = list_adapters(REPO)
    assert (found.filename, found.size) == (FILE, file.stat().st_size)
