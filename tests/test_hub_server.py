"""The test Hub against the real clients: huggingface_hub in this process, datasets in others."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub as hf
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import get_session

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import Fault, HubServer

DATASET = "tester/table"
MODEL = "tester/adapter"
WEIGHTS = bytes(range(256)) * 1200
PARQUET = "data/train-00000-of-00001.parquet"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One dataset with a parquet file, one model with a large file and a nested one."""
    root = tmp_path / "root"
    parquet = root / "datasets" / DATASET / PARQUET
    parquet.parent.mkdir(parents=True)
    pq.write_table(pa.table({"label": list(range(50))}), parquet)
    (root / "datasets" / DATASET / "README.md").write_text(
        "---\nlicense: mit\n---\n", encoding="utf-8"
    )
    model = root / "models" / MODEL
    (model / "deep" / "er").mkdir(parents=True)
    (model / "weights.safetensors").write_bytes(WEIGHTS)
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "deep" / "er" / "note é.txt").write_text("nested", encoding="utf-8")
    return root


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(root) as server:
        # Telemetry is a request to the default endpoint, whatever endpoint is passed.
        for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET"):
            monkeypatch.setattr(constants, name, True)
        yield server
        assert server.errors == []


@pytest.fixture
def api(hub: HubServer) -> hf.HfApi:
    return hf.HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the client would have made between tries, instead of making them."""
    pauses: list[float] = []
    for module in ("utils._http", "file_download"):
        clock = SimpleNamespace(sleep=pauses.append)
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
    return pauses


@pytest.fixture
def fs(hub: HubServer) -> hf.HfFileSystem:
    return hf.HfFileSystem(endpoint=hub.url, token=False, skip_instance_cache=True)


def download(
    api: hf.HfApi,
    tmp_path: Path,
    filename: str = "weights.safetensors",
    revision: str | None = None,
) -> bytes:
    path = api.hf_hub_download(MODEL, filename, revision=revision, cache_dir=tmp_path / "cache")
    return Path(path).read_bytes()


def run_client(code: str, url: str, home: Path, **env: str) -> str:
    """Run code in a process that knows the Hub only from its environment."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", **env},
        capture_output=True,
        timeout=60,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


class TestReading:
    def test_info(self, api: hf.HfApi, root: Path) -> None:
        info = api.dataset_info(DATASET, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        assert sizes[PARQUET] == (root / "datasets" / DATASET / PARQUET).stat().st_size
        model = api.model_info(MODEL, files_metadata=True)
        weights = next(f for f in model.siblings or [] if f.rfilename == "weights.safetensors")
        assert weights.lfs is not None
        assert weights.lfs.size == len(WEIGHTS)
        assert model.gated is False

    def test_extra_fields(self, api: hf.HfApi, root: Path) -> None:
        (root / "models" / MODEL / ".hub.json").write_text(
            '{"tags": ["lora"], "downloads": 7}', encoding="utf-8"
        )
        info = api.model_info(MODEL)
        assert (info.tags, info.downloads) == (["lora"], 7)
        assert ".hub.json" not in api.list_repo_files(MODEL)

    def test_listing(self, api: hf.HfApi) -> None:
        files = ["config.json", "deep/er/note é.txt", "weights.safetensors"]
        assert api.list_repo_files(MODEL) == files
        top = [entry.path for entry in api.list_repo_tree(MODEL)]
        assert top == ["deep", "config.json", "weights.safetensors"]
        deep = api.list_repo_tree(MODEL, "deep", recursive=True, expand=True)
        assert [entry.path for entry in deep] == ["deep/er", "deep/er/note é.txt"]
        entries = api.get_paths_info(MODEL, ["deep", "config.json", "absent"])
        assert [type(entry) for entry in entries] == [hf.RepoFolder, hf.RepoFile]

    def test_download(self, api: hf.HfApi, tmp_path: Path, hub: HubServer) -> None:
        assert download(api, tmp_path) == WEIGHTS
        assert download(api, tmp_path, filename="deep/er/note é.txt") == b"nested"
        gets = hub.requests("^GET .*/resolve/.*safetensors$")
        assert gets == [("GET", gets[0].path, 200, len(WEIGHTS))]
        assert hub.bytes_sent >= len(WEIGHTS)

    def test_cache_is_used_offline(self, hub: HubServer, tmp_path: Path) -> None:
        code = f"import huggingface_hub as hf; print(hf.hf_hub_download({MODEL!r}, 'config.json'))"
        online = run_client(code, hub.url, tmp_path / "home")
        hub.clear()
        assert run_client(code, hub.url, tmp_path / "home", HF_HUB_OFFLINE="1") == online
        assert hub.log == []

    def test_snapshot(self, api: hf.HfApi, tmp_path: Path) -> None:
        folder = api.snapshot_download(MODEL, cache_dir=tmp_path, allow_patterns=["*.json", "*/*"])
        found = {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}
        assert found == {"config.json", "deep/er/note é.txt"}

    def test_commit_ids(self, api: hf.HfApi, root: Path, tmp_path: Path) -> None:
        old = api.model_info(MODEL).sha or ""
        assert len(old) == 40
        assert download(api, tmp_path, revision=old) == WEIGHTS
        assert api.model_info(MODEL, revision=old).sha == old
        (root / "models" / MODEL / "config.json").write_text('{"r": 4}', encoding="utf-8")
        assert api.model_info(MODEL).sha != old
        with pytest.raises(errors.RevisionNotFoundError):
            api.model_info(MODEL, revision=old)

    def test_unknown(self, api: hf.HfApi, tmp_path: Path) -> None:
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info("tester/absent")
        with pytest.raises(errors.RevisionNotFoundError):
            api.list_repo_files(MODEL, revision="v2")
        with pytest.raises(errors.RevisionNotFoundError):
            download(api, tmp_path, revision="v2")
        with pytest.raises(errors.RemoteEntryNotFoundError):
            download(api, tmp_path, filename="absent 中\n")
        with pytest.raises(errors.RemoteEntryNotFoundError):
            list(api.list_repo_tree(MODEL, "absent"))

    @pytest.mark.parametrize(
        ("header", "status", "content"),
        [
            ("bytes=10-19", 206, WEIGHTS[10:20]),
            ("bytes=307190-", 206, WEIGHTS[-10:]),
            ("bytes=-5", 206, WEIGHTS[-5:]),
            ("bytes=307190-999999", 206, WEIGHTS[-10:]),
            ("bytes=307200-", 416, b""),
            ("bytes=0-1,5-6", 200, WEIGHTS),
        ],
    )
    def test_ranges(self, hub: HubServer, header: str, status: int, content: bytes) -> None:
        url = f"{hub.url}/{MODEL}/resolve/main/weights.safetensors"
        response = get_session().get(url, headers={"Range": header})
        assert (response.status_code, response.content) == (status, content)
        if status == 206:
            start = WEIGHTS.rindex(content) if content in WEIGHTS[-10:] else 10
            assert response.headers["Content-Range"] == (
                f"bytes {start}-{start + len(content) - 1}/{len(WEIGHTS)}"
            )

    def test_file_system(self, fs: hf.HfFileSystem, hub: HubServer) -> None:
        path = f"{MODEL}/weights.safetensors"
        assert fs.info(path)["size"] == len(WEIGHTS)
        assert f"{MODEL}/deep/er/note é.txt" in fs.glob(f"{MODEL}/**")
        hub.clear()
        assert fs.cat_file(path, start=1000, end=1100, cache_type="none") == WEIGHTS[1000:1100]
        assert [entry.bytes_sent for entry in hub.requests("/resolve/")] == [100]

    @pytest.mark.slow
    @pytest.mark.parametrize("options", ["", ", streaming=True"])
    def test_load_dataset(self, hub: HubServer, tmp_path: Path, options: str) -> None:
        code = (
            "from datasets import load_dataset\n"
            f"rows = load_dataset({DATASET!r}, split='train'{options})\n"
            "print(sum(row['label'] for row in rows))"
        )
        assert run_client(code, hub.url, tmp_path / "home") == str(sum(range(50)))


class TestAccess:
    @pytest.mark.parametrize(
        ("marker", "error"),
        [(".gated", errors.GatedRepoError), (".private", errors.RepositoryNotFoundError)],
    )
    def test_restricted(
        self, api: hf.HfApi, root: Path, tmp_path: Path, marker: str, error: type[Exception]
    ) -> None:
        (root / "models" / MODEL / marker).touch()
        with pytest.raises(error):
            download(api, tmp_path)
        with pytest.raises(error):
            api.model_info(MODEL)
        info = api.model_info(MODEL, token="hf_any")
        assert (info.gated, info.private) == (
            "manual" if marker == ".gated" else False,
            marker == ".private",
        )
        assert marker not in api.list_repo_files(MODEL, token="hf_any")

    @pytest.mark.parametrize(
        "path", ["../../secret", "%2e%2e/%2e%2e/secret", "..%2F..%2Fsecret", "link", ".gated"]
    )
    def test_nothing_outside_is_served(self, hub: HubServer, root: Path, path: str) -> None:
        for secret in (root / "secret", root.parent / "secret"):
            secret.write_text("4711", encoding="utf-8")
        (root / "models" / MODEL / "link").symlink_to(root / ".." / "secret")
        for url in (f"/{MODEL}/resolve/main/{path}", f"/tester/..%2F..%2F{path}/resolve/main/x"):
            connection = HTTPConnection("127.0.0.1", hub.server_port)  # it sends dots as they are
            connection.request("GET", url)
            response = connection.getresponse()
            assert response.status == 404
            assert b"4711" not in response.read()
            connection.close()

    def test_only_loopback(self, hub: HubServer) -> None:
        assert hub.server_address[0] == "127.0.0.1"


class TestWriting:
    @pytest.fixture
    def writer(self, hub: HubServer) -> hf.HfApi:
        return hf.HfApi(endpoint=hub.url, token="hf_test")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "upload"
        (folder / "sub").mkdir(parents=True)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
        (folder / "weights.safetensors").write_bytes(WEIGHTS)
        (folder / "sub" / "large.bin").write_bytes(os.urandom(2_000_000))
        (folder / "empty.safetensors").touch()
        return folder

    @pytest.mark.parametrize("kind", ["model", "dataset"])
    def test_round_trip(
        self, writer: hf.HfApi, hub: HubServer, folder: Path, tmp_path: Path, kind: str
    ) -> None:
        url = writer.create_repo("tester/new", repo_type=kind)
        assert (url.repo_id, url.repo_type) == ("tester/new", kind)
        writer.create_repo("tester/new", repo_type=kind, exist_ok=True)
        commit = writer.upload_folder(repo_id="tester/new", folder_path=folder, repo_type=kind)
        assert commit.oid == writer.repo_info("tester/new", repo_type=kind).sha
        assert len(hub.requests("^PUT /lfs/")) == 2
        copy = Path(writer.snapshot_download("tester/new", repo_type=kind, cache_dir=tmp_path))
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            assert (copy / path.relative_to(folder)).read_bytes() == path.read_bytes()

    def test_changes(self, writer: hf.HfApi, hub: HubServer) -> None:
        operations = [
            hf.CommitOperationDelete("deep/", is_folder=True),
            hf.CommitOperationCopy("weights.safetensors", "copy.safetensors"),
            hf.CommitOperationAdd("new.txt", b"new"),
        ]
        writer.create_commit(MODEL, operations, commit_message="change")
        left = ["config.json", "copy.safetensors", "new.txt", "weights.safetensors"]
        assert writer.list_repo_files(MODEL) == left
        writer.delete_file("new.txt", MODEL)
        assert not writer.file_exists(MODEL, "new.txt")
        hub.clear()
        writer.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=MODEL)
        assert hub.requests("/commit/") == [], "an unchanged file makes no commit"

    def test_commit_is_all_or_nothing(self, writer: hf.HfApi) -> None:
        before = writer.model_info(MODEL).sha
        add = hf.CommitOperationAdd("new.txt", b"new")
        with pytest.raises(errors.RemoteEntryNotFoundError):
            writer.create_commit(
                MODEL, [add, hf.CommitOperationDelete("absent")], commit_message="bad"
            )
        with pytest.raises(errors.HfHubHTTPError, match="412"):
            writer.create_commit(MODEL, [add], commit_message="late", parent_commit="0" * 40)
        assert writer.model_info(MODEL).sha == before

    @pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", ".gated"])
    def test_paths_stay_inside(self, hub: HubServer, path: str) -> None:
        line = json.dumps({"key": "file", "value": {"path": path, "content": "eA=="}})
        url = f"{hub.url}/api/models/{MODEL}/commit/main"
        headers = {"Authorization": "Bearer hf_test"}
        assert get_session().post(url, content=line, headers=headers).status_code == 400

    def test_token(self, root: Path, api: hf.HfApi, writer: hf.HfApi) -> None:
        assert writer.whoami()["name"] == "tester"
        with pytest.raises(errors.HfHubHTTPError, match="401"):
            api.create_repo("tester/new")
        with HubServer(root, token="hf_right") as strict:
            api = hf.HfApi(endpoint=strict.url, token="hf_wrong")
            assert api.model_info(MODEL).id == MODEL
            with pytest.raises(errors.HfHubHTTPError, match="401"):
                api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=MODEL)
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=MODEL, token="hf_right")


class TestFaults:
    """What each fault does, and with it what the client does about it."""

    GET = r"^GET .*/resolve/.*safetensors$"

    def statuses(self, hub: HubServer) -> list[tuple[int, int]]:
        return [(entry.status, entry.bytes_sent) for entry in hub.requests(self.GET)]

    def read_100(self, fs: hf.HfFileSystem) -> bytes:
        path = f"{MODEL}/weights.safetensors"
        content = fs.cat_file(path, start=1000, end=1100, cache_type="none")
        assert isinstance(content, bytes)
        return content

    @pytest.mark.parametrize("status", [429, 503])
    def test_status_is_retried(
        self, fs: hf.HfFileSystem, hub: HubServer, sleeps: list[float], status: int
    ) -> None:
        hub.faults.append(Fault(self.GET, "status", times=2, status=status))
        assert self.read_100(fs) == WEIGHTS[1000:1100]
        assert [status for status, _ in self.statuses(hub)] == [status, status, 206]
        assert sleeps == ([1, 1] if status == 429 else [1, 2])

    def test_retry_after(
        self, api: hf.HfApi, hub: HubServer, tmp_path: Path, sleeps: list[float]
    ) -> None:
        headers = {"Retry-After": "7"}
        hub.faults.append(Fault(self.GET, "status", status=429, headers=headers))
        assert download(api, tmp_path) == WEIGHTS
        assert sleeps == [8]

    def test_503_of_a_download_is_raised(
        self, api: hf.HfApi, hub: HubServer, tmp_path: Path
    ) -> None:
        hub.faults.append(Fault(self.GET, "status", status=503))
        with pytest.raises(errors.HfHubHTTPError, match="503"):
            download(api, tmp_path)

    def test_404(self, api: hf.HfApi, hub: HubServer) -> None:
        headers = {"X-Error-Code": "RepoNotFound"}
        hub.faults.append(Fault("^GET /api/", "status", status=404, headers=headers))
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info(MODEL)
        assert hub.faults[0].times == 0
        assert api.model_info(MODEL).id == MODEL

    @pytest.mark.parametrize(("action", "sent"), [("drop", len(WEIGHTS) // 2), ("short", None)])
    def test_broken_download_is_repeated(
        self,
        api: hf.HfApi,
        hub: HubServer,
        tmp_path: Path,
        sleeps: list[float],
        action: Any,
        sent: int | None,
    ) -> None:
        hub.faults.append(Fault(self.GET, action))
        assert download(api, tmp_path) == WEIGHTS
        assert self.statuses(hub) == [(200, sent or len(WEIGHTS)), (200, len(WEIGHTS))]
        assert sleeps == [1]

    def test_download_is_resumed_by_chunks(
        self,
        api: hf.HfApi,
        hub: HubServer,
        tmp_path: Path,
        sleeps: list[float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        hub.faults.append(Fault(self.GET, "drop"))
        assert download(api, tmp_path) == WEIGHTS
        half = len(WEIGHTS) // 2
        assert self.statuses(hub) == [(200, half), (206, half)]

    def test_client_believes_any_range(
        self,
        api: hf.HfApi,
        hub: HubServer,
        tmp_path: Path,
        sleeps: list[float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        hub.faults += [Fault(self.GET, "drop"), Fault(self.GET, "wrong_range")]
        content = download(api, tmp_path)
        assert len(content) == len(WEIGHTS)
        assert content != WEIGHTS

    def test_endless_drops_are_raised(
        self, api: hf.HfApi, hub: HubServer, tmp_path: Path, sleeps: list[float]
    ) -> None:
        hub.faults.append(Fault(self.GET, "drop", times=100))
        with pytest.raises(Exception, match="without sending complete message body"):
            download(api, tmp_path)
        assert len(sleeps) == 5

    def test_reset(
        self,
        api: hf.HfApi,
        fs: hf.HfFileSystem,
        hub: HubServer,
        tmp_path: Path,
        sleeps: list[float],
    ) -> None:
        hub.faults.append(Fault(self.GET, "reset", times=2))
        with pytest.raises(Exception, match="reset by peer"):
            download(api, tmp_path)
        assert self.read_100(fs) == WEIGHTS[1000:1100]

    def test_drop_of_a_head_answers_nothing(
        self, api: hf.HfApi, hub: HubServer, tmp_path: Path
    ) -> None:
        hub.faults.append(Fault("^HEAD ", "drop"))
        with pytest.raises(Exception, match="without sending a response"):
            download(api, tmp_path)

    def test_truncate(
        self, api: hf.HfApi, fs: hf.HfFileSystem, hub: HubServer, tmp_path: Path
    ) -> None:
        hub.faults.append(Fault(self.GET, "truncate", times=2))
        with pytest.raises(OSError, match="Consistency check failed"):
            download(api, tmp_path)
        assert self.read_100(fs) == WEIGHTS[1000:1050]

    def test_no_range(self, fs: hf.HfFileSystem, hub: HubServer) -> None:
        hub.faults.append(Fault(self.GET, "no_range"))
        assert self.read_100(fs) == WEIGHTS
        assert self.statuses(hub) == [(200, len(WEIGHTS))]

    @pytest.mark.parametrize(
        ("asked", "answered"),
        [("0-9", "1-10"), ("307190-307199", "307189-307198"), ("0-", "0-307198")],
    )
    def test_wrong_range(self, hub: HubServer, asked: str, answered: str) -> None:
        hub.faults.append(Fault(self.GET, "wrong_range"))
        url = f"{hub.url}/{MODEL}/resolve/main/weights.safetensors"
        get_session().get(url)
        assert hub.faults[0].times == 1, "only a request with a range uses it up"
        response = get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert response.status_code == 206
        assert response.headers["Content-Range"] == f"bytes {answered}/{len(WEIGHTS)}"
        start, end = (int(number) for number in answered.split("-"))
        assert response.content == WEIGHTS[start : end + 1]

    def test_wrong_etag(self, hub: HubServer) -> None:
        hub.faults.append(Fault("^HEAD ", "wrong_etag"))
        url = f"{hub.url}/{MODEL}/resolve/main/weights.safetensors"
        etags = [hf.get_hf_file_metadata(url).etag for _ in range(3)]
        assert etags[0] != etags[1] == etags[2]

    def test_delay(self, fs: hf.HfFileSystem, hub: HubServer) -> None:
        hub.faults.append(Fault(self.GET, "delay", seconds=0.2))
        start = time.monotonic()
        assert self.read_100(fs) == WEIGHTS[1000:1100]
        assert time.monotonic() - start >= 0.2


class TestLife:
    def test_stop_closes_open_connections(self, root: Path) -> None:
        with HubServer(root) as server:
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=5)
            for _ in range(2):
                connection.request("GET", f"/api/models/{MODEL}")
                connection.getresponse().read()
        assert connection.sock.recv(1) == b""

    def test_quiet(self, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with HubServer(root) as server:
            for request in (
                b"GET /now",
                b"nonsense\r\n\r\n",
                b"PUT / HTTP/1.1\r\nContent-Length: 9",
            ):
                with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                    connection.sendall(request)
            server.faults.append(Fault("^GET /x$", "reset"))
            with pytest.raises(Exception, match="reset by peer"):
                get_session().get(f"{server.url}/x")
            assert len(server.requests("^GET /x$")) == 1
            assert server.errors == []
        assert capfd.readouterr() == ("", "")

    def test_command_line(self, root: Path, tmp_path: Path) -> None:
        script = Path(__file__).with_name("hub_server.py")
        with subprocess.Popen(
            [sys.executable, script, root], stdout=subprocess.PIPE, encoding="utf-8"
        ) as process:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert hf.HfApi(endpoint=url, token=False).model_info(MODEL).id == MODEL
            process.terminate()
