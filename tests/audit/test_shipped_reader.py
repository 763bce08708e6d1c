"""What `scan` and `serve` do where no model is named: the shipped one reads files of its base."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from factories import write_adapter as write_row
from fastapi.testclient import TestClient
from safetensors.numpy import save_file

from lora_ws.audit.classify import NO_MODEL, Finding
from lora_ws.audit.examples import FOLDER
from lora_ws.audit.scan import ScanSpec
from lora_ws.audit.triage import triage
from lora_ws.bundle import Bundle
from lora_ws.bundle.shipped import ShippedReader
from lora_ws.cli import main
from lora_ws.errors import NotAvailableError
from lora_ws.web.serve import ServeSpec, make_app

FOREIGN = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
TINY = ("bicycle.safetensors", "orchid.safetensors")
ALIKE = "FLUX.1, HunyuanVideo, Chroma, BriaFibo or 4 others"
OTHER = {"sd15.safetensors": "SD1.x", "flux.safetensors": ALIKE}


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Files of bases that the shipped model does not read."""
    home = tmp_path / "others"
    write_row(home / "sd15.safetensors", np.ones(768 + 1280), ((FOREIGN, 768, 1280),))
    name = "transformer.single_transformer_blocks.0"
    sizes = {f"{name}.attn.to_q": (3072, 3072), f"{name}.proj_mlp": (3072, 12288)}
    draw = np.random.default_rng(0).standard_normal
    tensors = {}
    for module, (inputs, outputs) in sizes.items():
        tensors[f"{module}.lora_A.weight"] = draw((1, inputs)).astype(np.float16)
        tensors[f"{module}.lora_B.weight"] = draw((outputs, 1)).astype(np.float16)
    save_file(tensors, home / "flux.safetensors")
    return home


@pytest.fixture
def mixed(others: Path) -> Path:
    """The same and two files of tiny-sd."""
    for name in TINY:
        (others / name).write_bytes((FOLDER / name).read_bytes())
    return others


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of the bundles that are loaded from now on."""
    done, load = list[str](), Bundle.load

    def note(folder: Path, **more: object) -> Bundle:
        done.append(Path(folder).name)
        return load(folder, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Bundle, "load", note)
    return done


def scanned(home: Path, cache: Path, **options: object) -> dict[str, Finding]:
    spec = ScanSpec(cache=cache, **options)  # type: ignore[arg-type]
    return {Path(finding.file).name: finding for finding in triage([str(home)], spec).scan}


def test_scan_reads_files_of_its_base_and_tells_of_others_what_they_are(
    mixed: Path, tmp_path: Path, loads: list[str]
) -> None:
    found = scanned(mixed, tmp_path / "cache")
    assert loads == ["tiny-sd"]
    named = scanned(mixed, tmp_path / "cache", model="tiny-sd")
    bare = scanned(mixed, tmp_path / "cache", model="none")
    assert found.keys() == {*TINY, *OTHER}
    for name in TINY:
        assert found[name] == named[name]
        assert found[name].verdict
        assert found[name].evidence
    for name, base in OTHER.items():
        assert found[name].facts == bare[name].facts
        assert found[name].update_hash == bare[name].update_hash
        facts = found[name].facts
        assert facts
        assert facts.base == base
        why = found[name].no_prediction_reason
        said = f"content: no detector for this base: it is {base}, the shipped model reads tiny-sd"
        assert why == said, "of all files of a base it is the same, so that they are one group"
    assert {one.no_prediction_reason for one in bare.values()} == {NO_MODEL}
    assert not any(one.verdict for one in bare.values())
    marks = [
        json.loads(f.read_text(encoding="utf-8"))
        for f in (tmp_path / "cache").glob("*/settings.json")
    ]
    held = hashlib.sha256((ShippedReader().folder / "bundle.json").read_bytes()).hexdigest()
    assert sorted((m["bundle"] or "", m["shipped"]) for m in marks) == [
        ("", False),
        (held, False),
        (held, True),
    ]


@pytest.mark.parametrize("model", ["auto", "none", None])
def test_a_folder_without_such_files_loads_no_model(
    model: str | None, others: Path, tmp_path: Path, loads: list[str]
) -> None:
    found = scanned(others, tmp_path / "cache", model=model, out=tmp_path / "page.html")
    assert found.keys() == OTHER.keys()
    assert loads == []
    assert "The classifier" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_terminal_and_page_say_which_model(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, told = tmp_path / "page.html", "--model none leaves them out"
    args = ["scan", str(mixed), "--cache", str(tmp_path / "cache"), "--out", str(page)]
    held = hashlib.sha256((ShippedReader().folder / "bundle.json").read_bytes()).hexdigest()
    for more, shipped in ([], True), (["--model", "none"], False):
        assert main([*args, *more]) == 0
        assert (told in capsys.readouterr().out) is shipped
        text = page.read_text(encoding="utf-8")
        assert (held in text) is shipped
        assert ("The classifier" in text) is shipped


def test_a_policy_may_name_its_classes(others: Path, tmp_path: Path, loads: list[str]) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("classes: {reptile: 0.9}\n", encoding="utf-8")
    scanned(others, tmp_path / "cache", policy=policy)
    assert loads == []
    assert ShippedReader().classes == ShippedReader().bundle.classes


def test_a_server_does_the_same(mixed: Path, loads: list[str]) -> None:
    told = {}
    with TestClient(make_app(ServeSpec()), base_url="http://localhost") as client:
        assert len(client.get("/v1/about").json()["classes"]) == 10
        for name in (*OTHER, *TINY):
            content = (mixed / name).read_bytes()
            told[name] = client.post("/v1/file", params={"name": name}, content=content).json()
            assert loads == ["tiny-sd"] * (name in TINY)
    for name, base in OTHER.items():
        finding = told[name]["finding"]
        assert (finding["facts"]["base"], finding["verdict"]) == (base, None)
        assert finding["facts"]["norms"]
        assert "The classifier" not in told[name]["report"]
    held = hashlib.sha256((ShippedReader().folder / "bundle.json").read_bytes()).hexdigest()
    for name in TINY:
        assert told[name]["finding"]["verdict"]["label"] in ShippedReader().classes
        assert held in told[name]["report"]


def test_a_server_without_a_model_tells_of_files_alone(mixed: Path) -> None:
    with TestClient(make_app(ServeSpec("none")), base_url="http://localhost") as client:
        assert client.get("/v1/about").json()["classes"] == []
        content = (mixed / TINY[0]).read_bytes()
        assert client.post("/v1/file", content=content).json()["finding"]["verdict"] is None


@pytest.mark.parametrize("name", ["tiny", "automatic", "Auto"])
def test_a_wrong_name_is_refused(name: str) -> None:
    for ask in (lambda: ScanSpec(name).fetched(), lambda: make_app(ServeSpec(name))):
        with pytest.raises(NotAvailableError, match=r"nor shipped \(tiny-sd\)"):
            ask()
