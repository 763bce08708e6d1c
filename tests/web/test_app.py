"""The server as its users meet it: a real socket, real files, a real browser."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import schemathesis
import uvicorn
from browser import assert_readable, open_tab
from factories import write_adapter as write_row
from fastapi import FastAPI
from hub_server import HubServer
from hypothesis import HealthCheck, settings
from safetensors.numpy import load_file, save_file
from tolerances import rounding

from lora_ws.adapters import AdapterRef
from lora_ws.audit.classify import classify_files
from lora_ws.audit.scan import ScanSpec, library
from lora_ws.bundle import Bundle
from lora_ws.collection import AdapterSet, load
from lora_ws.featurizers import DeltaPCA
from lora_ws.functional.sketch import SIDE
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import MLP
from lora_ws.web.app import ServerLimits, create_app
from lora_ws.web.serve import ServeSpec, make_app

Layers = tuple[tuple[str, int, int], ...]
HOSTILE = "<img src=x onerror=alert(1)>.safetensors"


@pytest.fixture(scope="module")
def mini(_cache: None) -> AdapterSet:
    return load("lora-ws-mini", subset="per_adapter/class")


@pytest.fixture(scope="module")
def bundle(mini: AdapterSet) -> Bundle:
    fit = FitSpec(max_epochs=5)
    spec = ExperimentSpec(
        subset="per_adapter/class",
        featurizer=DeltaPCA(landmarks=64),
        model=MLP(hidden=(16,)),
        fit=fit,
    )
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    return make_bundle(fitted)


@pytest.fixture
def file(mini: AdapterSet, tmp_path: Path) -> Path:
    layers = tuple((s.name, s.in_features, s.out_features) for s in mini.layout.layers)
    return write_row(tmp_path / "loras" / "a.safetensors", mini.weights[400], layers)


@contextmanager
def serving(bundle: Bundle | None = None, **options: object) -> Iterator[httpx.Client]:
    with listening(create_app(bundle, **options)) as client:  # type: ignore[arg-type]
        yield client


@contextmanager
def listening(app: FastAPI) -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{opened.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def test_a_file_is_judged_as_on_the_command_line(
    file: Path, bundle: Bundle, tmp_path: Path
) -> None:
    known = library([str(file.parent)], ScanSpec(cache=tmp_path / "cache"))
    with serving(bundle, index=known) as client:
        answer = client.post(
            "/v1/file", params={"name": "a.safetensors"}, content=file.read_bytes()
        )
        about = client.get("/v1/about").json()
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert answer.status_code == 200
    said = answer.json()
    expected = classify_files([AdapterRef.parse(file)], bundle, evidence=True)[0].finding
    assert expected is not None
    assert "no_prediction_reason" in schemas["Finding"]["properties"]
    assert said["finding"] == json.loads(
        json.dumps({**expected.to_dict(), "file": "a.safetensors"})
    )
    assert said["nearest"] == [
        {"name": str(file), "cosine": pytest.approx(1, abs=rounding(SIDE**2))}
    ]
    assert "certifies nothing" in said["report"]
    assert (about["base"], about["known"], len(about["classes"])) == ("tiny-sd", 1, 10)


WRONG = {
    "html": b"<!DOCTYPE html><html></html>",
    "empty": b"",
    "pickle": b"\x80\x02}q\x00.",
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 400), ("0.0.0.0", 200)])
def test_a_spec_makes_the_server(
    bundle: Bundle, file: Path, tmp_path: Path, host: str, status: int
) -> None:
    bundle.save(tmp_path / "bundle")
    spec = ServeSpec(str(tmp_path / "bundle"), index=str(file), host=host, max_mb=2)
    with listening(make_app(spec)) as client:
        about = client.get("/v1/about").json()
        assert client.get("/v1/about", headers={"Host": "elsewhere"}).status_code == status
    assert (about["classes"], about["known"], about["max_mb"]) == ([*bundle.classes], 1, 2)


def test_a_file_that_is_none_has_a_reason_and_no_path_in_it() -> None:
    with serving() as client:
        for reason, content in WRONG.items():
            said = client.post("/v1/file", params={"name": "x.safetensors"}, content=content).json()
            assert said["finding"]["reason"] == reason
            assert "/tmp" not in json.dumps(said)
            assert "upload.safetensors" not in json.dumps(said)


def test_a_file_that_is_too_large_is_refused_with_and_without_its_length() -> None:
    with serving(limits=ServerLimits(max_mb=1)) as client:
        assert client.post("/v1/file", content=bytes(1_000_001)).status_code == 413
        parts = (bytes(1000) for _ in range(1001))
        answer = client.post("/v1/file", content=parts)
        assert answer.status_code == 413
        assert answer.json()["detail"] == "expected a file of at most 1 MB"
        assert client.post("/v1/file", content=bytes(1000)).status_code == 200


def test_a_form_is_refused_with_how_to_send_a_file(file: Path) -> None:
    with serving() as client:
        answer = client.post("/v1/file", files={"file": file.read_bytes()})
        assert answer.status_code == 415
        assert "--data-binary" in answer.json()["detail"]


NO_FILE = [
    "/etc/passwd",
    "../x.safetensors",
    "file:///etc/passwd.safetensors",
    "hub:/etc/passwd.safetensors",
    "hub:owner/name",
    "hub:owner/../../x.safetensors",
    "hub:owner/name/../../x.safetensors",
    "hub:owner/name/folder/..x.safetensors",
    "hub:owner/name/x.safetensors@..",
    "hub:owner/name/list.txt",
    "hub:owner/name/a\0.safetensors",
    f"hub:owner/name/{'a' * 400}.safetensors",
    "",
]


@pytest.mark.parametrize("name", NO_FILE, ids=lambda name: repr(name[:30]))
def test_what_names_no_file_of_a_repository_is_refused(name: str) -> None:
    with serving() as client:
        answer = client.post("/v1/hub", json={"id": name})
        assert answer.status_code == 422
        assert "root:" not in answer.text


def test_the_name_of_an_upload_is_no_path(file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(file.read_bytes())
    with serving() as client:
        said = client.post("/v1/file", params={"name": str(secret)}, content=b"").json()
    assert said["finding"]["reason"] == "empty"


def test_pages_of_other_sites_are_refused(file: Path) -> None:
    with serving() as client:
        content = file.read_bytes()
        elsewhere = {"Origin": "http://elsewhere.example"}
        assert client.post("/v1/file", content=content, headers=elsewhere).status_code == 403
        own = {"Origin": str(client.base_url)}
        assert client.post("/v1/file", content=content, headers=own).status_code == 200
        # A name of the attacker's that leads to this machine.
        assert client.get("/v1/about", headers={"Host": "rebound.example"}).status_code == 400
        headers = client.get("/").headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_more_than_may_wait_are_turned_away(file: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        content = file.read_bytes()
        yield content[:100]
        begun.set()
        go_on.wait(60)
        yield content[100:]

    with serving(limits=ServerLimits(at_once=1, waiting=0)) as client:
        first: list[int] = []
        url = f"{client.base_url}/v1/file"
        upload = threading.Thread(
            target=lambda: first.append(httpx.post(url, content=slowly(), timeout=60).status_code)
        )
        upload.start()
        assert begun.wait(60)
        answers = {client.post("/v1/file", content=b"").status_code for _ in range(3)}
        assert client.get("/v1/about").status_code == 200
        go_on.set()
        upload.join()
    assert answers == {503}
    assert first == [200]


def test_an_upload_that_takes_too_long_is_given_up() -> None:
    done = threading.Event()

    def never() -> Iterator[bytes]:
        yield b"x"
        done.wait(60)
        yield b"x"

    with serving(limits=ServerLimits(upload_s=0.3)) as client:
        try:
            threading.Timer(1, done.set).start()
            assert client.post("/v1/file", content=never()).status_code == 408
        finally:
            done.set()


def test_a_file_on_the_hub_is_read_in_parts(
    file: Path,
    bundle: Bundle,
    server: HubServer,
    hub_env: Callable[..., dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "hub" / "models" / "someone" / "loras"
    home.mkdir(parents=True)
    (home / "a.safetensors").write_bytes(file.read_bytes())
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HOME"):
        monkeypatch.setenv(name, hub_env()[name])
    with serving(bundle) as client:
        said = client.post("/v1/hub", json={"id": "hub:someone/loras/a.safetensors"}).json()
        gone = client.post("/v1/hub", json={"id": "hub:someone/loras/b.safetensors"}).json()
    assert said["finding"]["verdict"]
    assert len(said["finding"]["revision"]) == 40
    assert gone["finding"]["reason"] == "missing"


@pytest.mark.slow
def test_a_person_chooses_a_file_and_sees_the_verdict(
    file: Path, bundle: Bundle, tmp_path: Path
) -> None:
    hostile = tmp_path / HOSTILE
    save_file(load_file(file), hostile, {"ss_output_name": "<script>alert(2)</script>"})
    with serving(bundle) as client, open_tab(str(client.base_url), tmp_path) as tab:
        assert "10 classes of tiny-sd" in tab.wait("document.getElementById('about').innerText")
        tab.choose("#file", hostile)
        verdict = tab.wait("document.getElementById('verdict').innerText")
        label = classify_files([AdapterRef.parse(file)], bundle)[0].finding.verdict  # type: ignore[union-attr]
        assert label is not None
        assert verdict.startswith(label.label or "The classifier abstains")
        assert tab.value("document.getElementById('state').innerText") == HOSTILE
        assert tab.value("document.querySelectorAll('img').length") == 0
        # Without allow-same-origin the frame is a stranger to this page.
        sandbox = tab.value("document.getElementById('report').sandbox.value")
        assert sandbox == "allow-scripts allow-downloads"
        assert 'class="heat"' in tab.value("document.getElementById('report').srcdoc")
        assert_readable(tab)
        tab.choose("#file", tmp_path / "none.txt")
        tab.value("document.getElementById('id').value = '/etc/passwd'")
        tab.value("document.getElementById('hub').requestSubmit()")
        assert "expected hub:owner/name" in tab.wait(
            "document.getElementById('state').innerText.includes('/etc/passwd:') && "
            "document.getElementById('state').innerText"
        )
        assert tab.value("document.getElementById('result').hidden")


api = schemathesis.openapi.from_asgi("/openapi.json", create_app(hosts=("*",)))


@pytest.mark.slow
@api.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_api_is_as_it_describes_itself(
    case: schemathesis.Case, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    case.call_and_validate()
