"""Fixtures shared by all tests: a collection with a planted signal, and a cache of their own."""

import importlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from s3_server import S3Server, clear
from warm import Warm

from lora_ws import hub
from lora_ws.adapters import Layout
from lora_ws.collection import AdapterSet, DatasetCard

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Expanded collections go to a folder of the test run, never to the user's cache."""
    os.environ["LORA_WS_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "lora_ws_cache")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever leaves this machine is a mistake of a test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs code in child processes that start at once."""
    with Warm(tmp_path_factory.mktemp("warm"), "lora_ws.collection") as started:
        yield started


@pytest.fixture(scope="session")
def warm_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """The same with what trains and what draws loaded, and with it the Hub's settings."""
    with Warm(tmp_path_factory.mktemp("warm_all"), "lora_ws.learn.run", "lora_ws.zoo.build") as one:
        yield one


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on loopback that wants a token for whatever writes."""
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub", token="secret") as server:
        yield server


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A store of S3's kind on loopback; clients ask three times without a pause."""
    pytest.importorskip("s3fs")
    (tmp_path / "s3").mkdir()
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(hub, "PAUSES", (0, 0))
        clear()
        yield server
    clear()


@pytest.fixture
def hub_env(server: HubServer, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The environment of a process that knows this Hub alone, with changes."""

    def make(**changes: str) -> dict[str, str]:
        return {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": "secret",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **changes,
        }

    return make


@pytest.fixture
def as_hub_user(hub_env: Callable[..., dict[str, str]]) -> Iterator[Callable[..., None]]:
    """Make this process one of that environment, with changes; it ends with the test."""
    with pytest.MonkeyPatch.context() as patch:

        def become(**changes: str) -> None:
            patch.undo()
            for name, value in hub_env(**changes).items():
                patch.setenv(name, value)
            importlib.reload(constants)  # reads the environment

        yield become
    importlib.reload(constants)


@pytest.fixture
def make_zoo() -> Callable[..., AdapterSet]:
    """Synthetic adapters of the small layout; ``signal`` moves a few layers by class."""

    def make(n: int = 120, signal: float = 1.0, classes: int = 4, seed: int = 0) -> AdapterSet:
        rng = np.random.default_rng(seed)
        layout = Layout.known("tiny_sd_qv")
        labels = np.arange(n) % classes
        weights = rng.standard_normal((n, layout.size), dtype=np.float32)
        centres = rng.standard_normal((classes, 600), dtype=np.float32)
        weights[:, :600] += signal * centres[labels]
        # Classes differ in spread too, so that statistics can tell them apart.
        weights[:, 600:1200] *= (1 + signal * labels[:, None]).astype(np.float32)
        names = np.array([f"class{k}" for k in range(classes)])[labels]
        rows = pa.table({"category_label": names, "sha256": [f"{seed}-{k}" for k in range(n)]})
        return AdapterSet(weights, layout, rows, DatasetCard(name="synthetic"))

    return make
