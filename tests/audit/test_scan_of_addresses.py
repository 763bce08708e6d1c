"""A scan of a store of S3's kind finds what a scan of the same files on disk finds."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import write_adapter
from s3_server import Fault, S3Server
from safetensors.numpy import save_file

from lora_ws.cli import main
from lora_ws.collection import load

pytestmark = pytest.mark.slow
FILES = 4


@pytest.fixture
def bucket(s3: S3Server) -> Path:
    """A folder of adapters, one of them PEFT's, and of what is none."""
    import numpy as np

    mini, home = load("lora-ws-mini"), s3.root / "bucket" / "loras"
    layers = tuple((s.name, s.in_features, s.out_features) for s in mini.layout.layers)
    home.mkdir(parents=True)
    for row in range(FILES):
        write_adapter(home / f"{row}.safetensors", mini.weights[row], layers)
    (home / "error.html.safetensors").write_text("<!DOCTYPE html><html></html>", encoding="utf-8")
    save_file({"a": np.zeros(3, np.float32)}, home / "none.safetensors")
    (home / "peft").mkdir()
    ((home / "0.safetensors").rename(home / "peft" / "adapter_model.safetensors"))
    (home / "peft" / "notes.txt").touch()
    return home


def lines(text: str, home: str) -> list[dict[str, Any]]:
    """Findings without where the files are, and how many bytes a reader asked for."""
    found = [json.loads(line) for line in text.replace(home, "HOME").splitlines()]
    return [{key: one[key] for key in one if key != "bytes_read"} for one in found]


def test_findings_are_those_of_the_files_on_disk(
    s3: S3Server, bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, cache = "s3://bucket/loras", ("--cache", str(tmp_path / "cache"))
    outputs = {"--json": "found.jsonl", "--csv": "found.csv", "--out": "found.html"}
    places = [x for flag, file in outputs.items() for x in (flag, f"s3://bucket/out/{file}")]
    # A connection that breaks costs no finding.
    s3.faults.append(Fault("^GET /bucket/loras/2", "drop"))
    assert main(["scan", there, *cache, *places]) == 3
    assert main(["scan", str(bucket), "--json", str(tmp_path / "local.jsonl")]) == 3
    out = s3.root / "bucket/out"
    found = lines((out / "found.jsonl").read_text("utf-8"), there)
    assert found == lines((tmp_path / "local.jsonl").read_text("utf-8"), str(bucket))
    assert [one["reason"] for one in found] == ["", "", "", "html", "not-an-adapter", ""]
    assert all(one["verdict"] and one["sha256"] for one in found if not one["reason"])
    assert len((out / "found.csv").read_text("utf-8").splitlines()) == FILES + 3
    assert there in (out / "found.html").read_text("utf-8")
    s3.log.clear()
    capsys.readouterr()
    assert main(["scan", there, *cache]) == 3
    assert f"0 read now, {FILES + 2} known already" in capsys.readouterr().out
    assert not [line for line in s3.log if line.startswith("GET /bucket/loras")]


def test_a_lie_costs_one_finding(s3: S3Server, bucket: Path, tmp_path: Path) -> None:
    s3.faults.append(Fault("^GET /bucket/loras/2", "short"))
    file = tmp_path / "found.jsonl"
    assert main(["scan", "s3://bucket/loras", "--json", str(file)]) == 3
    found = lines(file.read_text("utf-8"), "s3://bucket/loras")
    assert [one["reason"] for one in found] == ["", "remote", "", "html", "not-an-adapter", ""]
    assert len(found) == len(list(bucket.rglob("*.safetensors")))
