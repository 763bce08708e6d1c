"""`load` end to end: child processes against a Hub on loopback, with its faults."""

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from factories import make_table, sd15_layers, weights, write_parquet
from hub_server import Fault, HubServer
from warm import Warm

from lora_ws.collection.card import find_card
from lora_ws.errors import NotAvailableError

SIZE, ROWS = 99_648, 4
NSFW, ONE_K = "jacekduszenko/lora-ws-nsfw", "jacekduszenko/lora-ws-1k"
FIRST, SECOND = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
CHILD = """
import hashlib, json, sys
import lora_ws
try:
    zoo = lora_ws.load(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
    digest = hashlib.sha256(zoo.weights.tobytes()).hexdigest()
    print(json.dumps([digest, zoo.labels()[0].tolist(), dict(zoo.manifest)]))
except lora_ws.LoraWsError as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def write_repositories(root: Path) -> None:
    values = weights(2 * ROWS, SIZE)
    flat = pa.table({"label": ["neutral", "hentai"] * 2, "weights": list(values[:ROWS])})
    write_parquet(root / "datasets" / NSFW / FIRST.replace("2.par", "1.par"), flat)
    for name, part in [(FIRST, slice(0, 2)), (SECOND, slice(2, 4))]:
        table = make_table(values[ROWS:][part], sd15_layers())
        write_parquet(root / "datasets" / ONE_K / name, table)
        (root / "datasets" / ONE_K / "README.md").write_text("about", encoding="utf-8")


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_repositories(root)
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[HubServer]:
    with HubServer(root) as server:
        yield server
        assert server.errors == []


class User:
    """Somebody with a cache of their own."""

    def __init__(self, home: Path, endpoint: str, warm: Warm) -> None:
        self.home = home
        self.warm = warm
        self.env = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "LORA_WS_CACHE": str(home / "ours"),
        }

    def load(self, *arguments: str, **env: str):
        return json.loads(self.warm.run(CHILD, *arguments, **self.env | env).splitlines()[-1])

    def hub_cache(self) -> Path:
        (folder,) = (self.home / "hf" / "hub").glob("datasets--*")
        return folder

    def forget_store(self) -> None:
        (self.home / "ours").rename(self.home / "forgotten")


@pytest.fixture
def user(tmp_path: Path, hub: HubServer, warm: Warm) -> User:
    return User(tmp_path, hub.url, warm)


def commit(hub: HubServer, repo: str) -> str:
    return hub.store.repo("datasets", repo).commit


def one_sentence_with_both_ways_out(message: str, name: str) -> bool:
    parts = [f"`lora-ws data import {name}`", f"`lora-ws data import FOLDER --card {name}`"]
    return (
        message.startswith("NotAvailableError: ")
        and "\n" not in message
        and ". " not in message
        and all(part in message for part in parts)
    )


@pytest.mark.slow
def test_flat_collection_is_fetched_once(hub: HubServer, user: User):
    content, labels, manifest = user.load("lora-ws-nsfw")
    assert content == digest(weights(2 * ROWS, SIZE)[:ROWS])
    assert labels == [0, 1, 0, 1]
    assert (manifest["hub_id"], manifest["commit"]) == (NSFW, commit(hub, NSFW))
    hub.clear()
    assert user.load("lora-ws-nsfw")[0] == content
    assert user.load("lora-ws-nsfw", HF_HUB_OFFLINE="1")[0] == content
    assert hub.requests() == []


@pytest.mark.slow
def test_shards_of_matrices_and_the_hubs_cache(hub: HubServer, user: User):
    expected = digest(weights(2 * ROWS, SIZE)[ROWS:])
    # The address of a commit works like a name, and is what the manifest records.
    pin = commit(hub, ONE_K)
    content, labels, manifest = user.load("lora-ws-1k", pin)
    assert (content, labels, manifest["commit"]) == (expected, [2, 4, 2, 4], pin)
    assert hub.requests("README") == []
    assert all(pin in e.path for e in hub.requests("^(GET|HEAD) .*/resolve/"))
    # The files alone are enough where the store is gone.
    user.load("lora-ws-1k")
    user.forget_store()
    hub.clear()
    assert user.load("lora-ws-1k", HF_HUB_OFFLINE="1")[0] == expected
    assert hub.requests() == []


@pytest.mark.slow
def test_cached_part_of_the_shards_is_refused(hub: HubServer, user: User):
    user.load("lora-ws-1k")
    user.forget_store()
    (shard,) = user.hub_cache().glob(f"snapshots/*/{SECOND}")
    shard.unlink()
    message = user.load("lora-ws-1k", HF_HUB_OFFLINE="1")
    assert "only a part of `lora-ws-1k`" in message
    assert one_sentence_with_both_ways_out(message, "lora-ws-1k")
    # Back on line, only what is missing is fetched.
    hub.clear()
    assert user.load("lora-ws-1k")[0] == digest(weights(2 * ROWS, SIZE)[ROWS:])
    assert hub.requests(f"GET .*{FIRST}") == []


def test_offline_and_nothing_cached(user: User):
    message = user.load("lora-ws-nsfw", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in message
    assert one_sentence_with_both_ways_out(message, "lora-ws-nsfw")


def test_unreachable_and_nothing_cached(user: User):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = user.load("lora-ws-nsfw", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert "the Hub cannot be reached" in message
    assert one_sentence_with_both_ways_out(message, "lora-ws-nsfw")


@pytest.mark.parametrize(
    ("marker", "arguments", "message"),
    [
        ("absent", [], "does not exist, or is private"),
        (".gated", [], "is gated: accept its terms"),
        ("", ["0" * 40], f"has no revision `{'0' * 40}`"),
        ("empty", [], "holds no file that matches"),
    ],
    ids=["absent", "gated", "revision", "empty"],
)
def test_definite_no_is_explained(
    marker: str, arguments: list[str], message: str, tmp_path: Path, warm: Warm
):
    repository = tmp_path / "hub" / "datasets" / NSFW
    if marker != "absent":
        name = "README.md" if marker == "empty" else FIRST
        write_parquet(repository / name, pa.table({"label": ["neutral"]}))
    if marker == ".gated":
        (repository / marker).touch()
    with HubServer(tmp_path / "hub") as server:
        answer = User(tmp_path, server.url, warm).load("lora-ws-nsfw", *arguments)
    assert answer.startswith(f"NotAvailableError: {NSFW}")
    assert message in answer


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        [Fault("^GET /api/datasets/", "status", status=503)],
        [Fault("^GET /api/datasets/", "status", status=429)],
        [Fault("^GET .*/resolve/", "status", status=429)],
        [Fault("^GET .*/resolve/", "drop"), Fault("^GET .*/resolve/", "short")],
    ],
    ids=["listing 503", "listing 429", "file 429", "file dropped"],
)
def test_passing_trouble_passes(faults: list[Fault], hub: HubServer, user: User):
    hub.faults += faults
    assert user.load("lora-ws-nsfw")[0] == digest(weights(2 * ROWS, SIZE)[:ROWS])
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.slow
def test_lasting_trouble_is_one_sentence(hub: HubServer, user: User):
    hub.faults.append(Fault("^GET /api/datasets/", "status", times=9, status=500))
    message = user.load("lora-ws-nsfw")
    assert "the Hub cannot be reached" in message
    assert one_sentence_with_both_ways_out(message, "lora-ws-nsfw")


@pytest.mark.slow
def test_file_spoilt_on_the_way_is_refused_and_fetched_anew(tmp_path: Path, root: Path, warm: Warm):
    """The listing is of the true content, the body is of another: same size, one byte differs."""

    class Spoiling(HubServer):
        spoil = True

        def answer(self, request, raw_path):
            reply = super().answer(request, raw_path)
            if self.spoil and request.method == "GET" and "/resolve/" in raw_path:
                middle = len(reply.body) // 2
                flipped = bytes([reply.body[middle] ^ 1])
                reply.body = reply.body[:middle] + flipped + reply.body[middle + 1 :]
            return reply

    for limit in (1 << 20, 1 << 30):  # as an LFS file, and as an ordinary one
        with Spoiling(root, lfs_limit=limit) as server:
            user = User(tmp_path / str(limit), server.url, warm)
            message = user.load("lora-ws-nsfw")
            assert "came damaged from the Hub" in message
            assert "try again" in message
            server.spoil = False
            assert user.load("lora-ws-nsfw")[0] == digest(weights(2 * ROWS, SIZE)[:ROWS])


def test_images_are_no_adapters(user: User, hub: HubServer):
    message = user.load("weightspace-images")
    assert message.startswith("DataError: `weightspace-images` holds images, not adapters")
    assert hub.requests() == []


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["", "@main"])
def test_an_address_of_a_known_collection_is_the_collection(user: User, revision: str):
    content, labels, _ = user.load(f"hf://datasets/{NSFW}{revision}")
    assert (content, labels) == (digest(weights(2 * ROWS, SIZE)[:ROWS]), [0, 1, 0, 1])
    assert user.load("lora-ws-nsfw", HF_HUB_OFFLINE="1")[0] == content


@pytest.mark.slow
def test_an_address_of_another_collection_is_fetched_and_kept(root: Path, user: User):
    values = weights(ROWS, SIZE)
    table = make_table(values, sd15_layers())
    write_parquet(root / "datasets" / "someone/else" / FIRST.replace("2.par", "1.par"), table)
    assert user.load("hf://datasets/someone/else")[0] == digest(values)
    assert user.load("hf://datasets/someone/else", HF_HUB_OFFLINE="1")[0] == digest(values)


def test_an_address_inside_a_repository_is_refused():
    with pytest.raises(NotAvailableError, match="expected a whole repository, got the path data"):
        find_card(f"hf://datasets/{NSFW}/data")
    with pytest.raises(NotAvailableError, match="expected hf://datasets/owner/name of a dataset"):
        find_card("hf://datasets/me")
