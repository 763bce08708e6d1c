"""Adapter files read in parts from a Hub on loopback, also where server or network go wrong."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from factories import shared_data
from hub_server import Fault, HubServer, Reply, Request
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_ws import hub as hub_module
from lora_ws.adapters import remote
from lora_ws.adapters.header import read_header
from lora_ws.adapters.remote import HubFile, HubSource, list_adapters, merge_ranges
from lora_ws.adapters.source import LocalSource, Source
from lora_ws.adapters.tensors import read_tensors
from lora_ws.errors import AdapterError, NotAvailableError

REPO, LARGE, SMALL = "tester/adapters", "large.safetensors", "deep/small.safetensors"
GET = "^GET .*(resolve|cdn)/"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a file of 8 MB, one of a few kB, and another repository."""
    root = tmp_path_factory.mktemp("hub")
    rng = np.random.default_rng(0)
    tensors = {
        f"layer{k:02d}.{role}": rng.standard_normal((50, 500), dtype=np.float32)
        for k in range(40)
        for role in ("down", "up")
    }
    folder = root / "models" / REPO
    (folder / "deep").mkdir(parents=True)
    save_file(tensors, folder / LARGE, {"format": "pt"})
    save_file({"a": rng.standard_normal(100).astype(np.float32)}, folder / SMALL)
    (folder / "README.md").write_text("about", encoding="utf-8")
    other = root / "models" / "tester" / "other"
    other.mkdir()
    save_file({"a": np.ones(1, np.float32)}, other / "x.safetensors")
    return root


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(root, token="secret") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(hub_module, "PAUSES", (0, 0))
        yield server
        assert server.errors == []


class Store(HubServer):
    """The store that a Hub redirects to; keeps the tokens it is shown."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.tokens: list[str | None] = []

    def answer(self, request: Request, raw_path: str) -> Reply:
        self.tokens.append(request.token)
        return super().answer(request, raw_path)


@pytest.fixture
def store(root: Path, hub: HubServer) -> Iterator[Store]:
    with Store(root) as server:
        hub.cdn = server.url
        yield server
        assert server.errors == []


def read(source: Source, *names: str) -> dict[str, np.ndarray]:
    header = read_header(source)
    return read_tensors(source, header, names or header.tensors)


def same(found: dict[str, np.ndarray], file: Path) -> bool:
    expected = load_file(file)
    return all(found[key].tobytes() == expected[key].tobytes() for key in found)


@pytest.mark.parametrize("filename", [LARGE, SMALL])
@pytest.mark.parametrize("whole_below", [0, 10**9])
def test_remote_and_local_agree_bit_for_bit(
    filename: str, whole_below: int, hub: HubServer, root: Path
):
    source = HubSource(REPO, filename, whole_below=whole_below)
    local = LocalSource(root / "models" / REPO / filename)
    assert read_header(source) == read_header(local)
    found, expected = read(source), read(local)
    assert list(found) == list(expected)
    assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)
    assert same(found, local.path)
    assert source.size == local.size


def test_header_is_one_request_of_128_kB(hub: HubServer):
    source = HubSource(REPO, LARGE)
    read_header(source)
    read_header(source)
    assert source.bytes_read == 1 << 17
    assert [e.bytes_sent for e in hub.requests("^GET")] == [1 << 17]
    assert len(hub.requests()) == 2


def test_one_tensor_moves_few_bytes(hub: HubServer, root: Path):
    source = HubSource(REPO, LARGE)
    found = read(source, "layer30.up")
    assert same(found, root / "models" / REPO / LARGE)
    assert source.bytes_read == (1 << 17) + 50 * 500 * 4
    assert source.bytes_read == hub.bytes_sent
    assert source.bytes_read < source.size / 30


def test_small_file_is_one_request(hub: HubServer, root: Path):
    source = HubSource(REPO, SMALL)
    assert same(read(source), root / "models" / REPO / SMALL)
    assert source.bytes_read == source.size
    assert [e.status for e in hub.requests("^GET")] == [200]


def test_long_header_is_read_in_two_requests(hub: HubServer, tmp_path: Path):
    file = hub.store.root / "models" / REPO / "long.safetensors"
    save_file({"a": np.ones(3, np.float32)}, file, {"thumbnail": "x" * 300_000})
    try:
        source = HubSource(REPO, "long.safetensors", whole_below=0)
        assert same(read(source), file)
        assert len(hub.requests("^GET")) == 3
    finally:
        file.unlink()


def test_near_ranges_are_one_request_and_far_ones_are_not(hub: HubServer):
    source = HubSource(REPO, LARGE)
    header = read_header(source)
    start, stop = header.range_of("layer20.down")
    wanted = [(stop + 60_000, stop + 60_100), (start, stop), (stop + 200_000, stop + 200_001)]
    hub.clear()
    parts = source.read(wanted)
    data = (hub.store.root / "models" / REPO / LARGE).read_bytes()
    assert parts == [data[a:b] for a, b in wanted]
    assert [e.bytes_sent for e in hub.requests("^GET")] == [stop - start + 60_100, 1]


def test_long_range_is_asked_for_in_pieces(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "REQUEST_BYTES", 1_000_000)
    source = HubSource(REPO, LARGE)
    (part,) = source.read([(200_000, source.size)])
    assert part == (hub.store.root / "models" / REPO / LARGE).read_bytes()[200_000:]
    assert max(e.bytes_sent for e in hub.requests("^GET")) == 1_000_000


RANGES = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 50)).map(lambda t: (t[0], sum(t))), max_size=12
)


@given(RANGES, st.integers(0, 60), st.integers(1, 200))
def test_merged_ranges_cover_the_given_ones_and_little_more(
    ranges: list[tuple[int, int]], gap: int, most: int
):
    merged = merge_ranges(ranges, gap, most)
    assert merged == sorted(merged)
    wanted = {byte for span in ranges for byte in range(*span)}
    covered = {byte for span in merged for byte in range(*span)}
    assert wanted <= covered
    assert all(any(a <= start and stop <= b for a, b in merged) for start, stop in ranges)
    assert all(span in ranges or span[1] - span[0] <= most for span in merged)
    assert len(covered - wanted) <= gap * len(ranges)


LIES = {
    "another range": (Fault(GET, "wrong_range", times=9), "Content-Range"),
    "the whole file instead": (
        Fault(GET, "no_range", times=9),
        "expected of the server status 206",
    ),
    "announced too long": (Fault(GET, "short", times=9), "Content-Length"),
    "announced too short": (Fault(GET, "truncate", times=9), "Content-Length"),
    "dropped again and again": (Fault(GET, "drop", times=9), "RemoteProtocolError"),
    "busy again and again": (Fault(GET, "status", times=9, status=503), "status 503"),
    "not found any more": (Fault(GET, "status", status=404), "404"),
    "compressed": (Fault(GET, "delay", seconds=0, headers={"Content-Encoding": "gzip"}), "gzip"),
    "another total": (
        Fault(GET, "delay", seconds=0, headers={"Content-Range": "bytes 0-131071/9000000"}),
        "Content-Range",
    ),
    "redirected nowhere": (
        Fault(GET, "status", times=9, status=302, headers={"Location": "http://[oops"}),
        "ValueError",
    ),
    "redirected for ever": (
        Fault(GET, "status", times=9, status=302, headers={"Location": ""}),
        "redirects",
    ),
    "redirected to a file": (
        Fault(GET, "status", status=302, headers={"Location": "file:///etc/passwd"}),
        "secure address",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_wrong_answer_is_refused(lie: str, hub: HubServer):
    fault, message = LIES[lie]
    hub.faults.append(Fault(**vars(fault)))
    source = HubSource(REPO, LARGE)
    with pytest.raises(AdapterError) as caught:
        read_header(source)
    assert caught.value.reason == "remote"
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{REPO}/{LARGE}: ")


@pytest.mark.parametrize("lie", ["announced too long", "announced too short", "compressed"])
def test_wrong_answer_of_a_whole_file_is_refused(lie: str, hub: HubServer):
    hub.faults.append(Fault(**vars(LIES[lie][0])))
    with pytest.raises(AdapterError) as caught:
        read(HubSource(REPO, SMALL))
    assert caught.value.reason == "remote"


@pytest.mark.parametrize("change", [-1, 1, 10**6])
def test_body_of_another_length_than_announced_is_refused(change: int, root: Path, hub: HubServer):
    class Chunked(Store):
        """Announces the right length, but sends in chunks, where that does not count."""

        def answer(self, request: Request, raw_path: str) -> Reply:
            reply = super().answer(request, raw_path)
            reply.length = len(reply.body)
            body = reply.body[:change] if change < 0 else reply.body + bytes(change)
            reply.body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            reply.headers["Transfer-Encoding"] = "chunked"
            return reply

    with Chunked(root) as store:
        hub.cdn = store.url
        source = HubSource(REPO, LARGE)
        with pytest.raises(AdapterError, match="expected of the server 131072 bytes") as caught:
            read_header(source)
    assert caught.value.reason == "remote"
    assert source.bytes_read < (1 << 17) + 10**6


def test_whole_file_that_is_spoilt_on_the_way_is_refused(root: Path, hub: HubServer):
    class Spoiling(Store):
        def answer(self, request: Request, raw_path: str) -> Reply:
            reply = super().answer(request, raw_path)
            reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1])
            return reply

    with Spoiling(root) as store:
        hub.cdn = store.url
        with pytest.raises(AdapterError, match="damaged on the way") as caught:
            read(HubSource(REPO, SMALL))
    assert caught.value.reason == "remote"


def test_lie_about_the_size_is_refused(hub: HubServer):
    hub.faults.append(Fault("^HEAD", "delay", seconds=0, headers={"X-Linked-Size": "7000000"}))
    with pytest.raises(AdapterError, match="Content-Range") as caught:
        read_header(HubSource(REPO, LARGE))
    assert caught.value.reason == "remote"


def test_hub_that_names_no_commit_is_refused(hub: HubServer):
    hub.faults.append(Fault("^HEAD", "delay", seconds=0, headers={"X-Repo-Commit": ""}))
    with pytest.raises(AdapterError, match="commit and size") as caught:
        read_header(HubSource(REPO, LARGE))
    assert caught.value.reason == "remote"


def test_slow_answer_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "PATIENCE", -1e9)
    with pytest.raises(AdapterError, match="too slowly"):
        read_header(HubSource(REPO, LARGE))


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("^HEAD", "status", status=503), Fault("^HEAD", "drop")],
        [Fault(GET, "status", status=429), Fault(GET, "status", status=500)],
        [Fault(GET, "drop"), Fault(GET, "reset")],
    ],
    ids=["asking for the size", "busy", "dropped"],
)
@pytest.mark.parametrize("filename", [LARGE, SMALL])
def test_passing_trouble_passes(faults: list[Fault], filename: str, hub: HubServer, root: Path):
    hub.faults += [Fault(**vars(fault)) for fault in faults]
    source = HubSource(REPO, filename)
    assert same(read(source), root / "models" / REPO / filename)
    assert all(fault.times == 0 for fault in hub.faults)


def test_address_of_the_store_is_kept_and_shown_no_token(hub: HubServer, store: Store, root: Path):
    source = HubSource(REPO, LARGE)
    assert same(read(source, "layer10.up", "layer30.up"), root / "models" / REPO / LARGE)
    assert [e.status for e in hub.requests("^GET")] == [302]
    assert [e.status for e in store.requests()] == [206] * 3
    assert store.tokens == [None] * 3


def test_address_that_ran_out_is_asked_for_anew(hub: HubServer, store: Store, root: Path):
    source = HubSource(REPO, LARGE)
    header = read_header(source)
    store.faults.append(Fault("^GET /cdn/", "status", status=403))
    found = read_tensors(source, header, ["layer30.up"])
    assert same(found, root / "models" / REPO / LARGE)
    assert [e.status for e in hub.requests("^GET")] == [302, 302]
    assert [e.status for e in store.requests()] == [206, 403, 206]


def test_store_that_refuses_for_good_is_given_up(hub: HubServer, store: Store):
    store.faults.append(Fault("^GET /cdn/", "status", times=99, status=403))
    with pytest.raises(AdapterError, match="redirects and refusals") as caught:
        read_header(HubSource(REPO, LARGE))
    assert caught.value.reason == "remote"


def test_revision_is_pinned_to_a_commit(hub: HubServer):
    source = HubSource(REPO, LARGE, "main")
    assert len(source.revision) == 40
    read_header(source)
    assert hub.requests("^GET")[0].path == f"/{REPO}/resolve/{source.revision}/{LARGE}"
    again = HubSource(REPO, LARGE, source.revision)
    assert again.revision == source.revision


@pytest.mark.parametrize(
    ("repo", "filename", "revision", "kind", "message"),
    [
        (REPO, "absent.safetensors", None, AdapterError, "holds no such file"),
        ("tester/absent", LARGE, None, NotAvailableError, "does not exist"),
        (REPO, LARGE, "0" * 40, NotAvailableError, "has no revision"),
        ("no/such/name", LARGE, None, NotAvailableError, "valid repository id"),
    ],
)
def test_what_is_not_there_is_said(
    repo: str, filename: str, revision: str | None, kind: type, message: str, hub: HubServer
):
    with pytest.raises(kind, match=message):
        read_header(HubSource(repo, filename, revision))


def test_hub_that_cannot_be_reached_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    hub.stop()
    with pytest.raises(NotAvailableError, match="cannot be reached"):
        read_header(HubSource(REPO, LARGE))
    with pytest.raises(NotAvailableError, match="cannot be reached"):
        list(list_adapters(REPO))


def test_adapters_of_a_repository_and_of_an_owner_are_listed(hub: HubServer, root: Path):
    commit = HubSource(REPO, SMALL).revision
    sizes = {name: (root / "models" / REPO / name).stat().st_size for name in (LARGE, SMALL)}
    mine = [HubFile(REPO, name, sizes[name], commit) for name in (SMALL, LARGE)]
    assert list(list_adapters(REPO)) == mine
    everything = list(list_adapters("tester"))
    assert everything[:2] == mine
    assert [(f.repo_id, f.filename) for f in everything[2:]] == [("tester/other", "x.safetensors")]
    with pytest.raises(NotAvailableError, match="does not exist"):
        list(list_adapters("tester/absent"))


def test_real_file_is_read_alike_from_disk_and_hub(hub: HubServer, tmp_path: Path):
    file = shared_data("real_adapters") / "catundchat_bf16.safetensors"
    copy = hub.store.root / "models" / "tester" / "real" / file.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(file.read_bytes())
    try:
        found = read(HubSource("tester/real", file.name, whole_below=0))
    finally:
        copy.unlink()
        copy.parent.rmdir()
    expected = read(LocalSource(file))
    assert list(found) == list(expected)
    assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)
