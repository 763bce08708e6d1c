"""Sidecars: verdict and hashes where model managers look, and nothing of others lost."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_ws.adapters.source import tensor_sha256
from lora_ws.audit.classify import Finding
from lora_ws.audit.policy import Reviewed
from lora_ws.audit.scan import ScanSpec
from lora_ws.audit.sidecars import write_sidecars
from lora_ws.audit.triage import triage
from lora_ws.bundle.confidence import Prediction


def adapter(file: Path, metadata: dict[str, str] | None = None, rank: int = 4) -> Path:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_down.weight": np.ones((rank, 8), np.float16),
        f"{stem}.lora_up.weight": np.ones((8, rank), np.float16),
        f"{stem}.alpha": np.array(rank, np.float16),
    }
    save_file(tensors, file, metadata)
    return file


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rank", [1, 4])
def test_autov3_is_the_hash_of_the_numbers(tmp_path: Path, rank: int) -> None:
    plain = adapter(tmp_path / "a.safetensors", rank=rank)
    edited = adapter(tmp_path / "b.safetensors", {"ss_output_name": "x" * 999}, rank)
    size = sum(2 * n for n in (8 * rank, 8 * rank, 1))
    for file in (plain, edited):
        assert tensor_sha256(file) == hashlib.sha256(file.read_bytes()[-size:]).hexdigest()
    assert plain.read_bytes() != edited.read_bytes()


def test_a_scan_writes_them_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    home = tmp_path / "loras"
    home.mkdir()
    good = adapter(home / "good.safetensors")
    (home / "bad.safetensors").write_bytes(b"<html>")
    (home / "good.json").write_text('{"activation text": "sks", "notes": "mine"}', encoding="utf-8")
    (home / "bad.json").write_text("no json", encoding="utf-8")
    for _ in range(2):
        triage([str(home)], ScanSpec(sidecars=True, cache=tmp_path / "cache"))
    notes, info = read(home / "good.json"), read(home / "good.civitai.info")
    assert (notes["activation text"], notes["notes"]) == ("sks", "mine")
    assert notes["lora_ws"]["flags"] == []
    whole = hashlib.sha256(good.read_bytes()).hexdigest().upper()
    assert info["files"][0]["hashes"] == {
        "SHA256": whole,
        "AutoV2": whole[:10],
        "AutoV3": tensor_sha256(good)[:12].upper(),
    }
    assert (home / "bad.json").read_text(encoding="utf-8") == "no json"
    refused = read(home / "bad.civitai.info")
    assert refused["description"].startswith("lora_ws: not read: ")
    assert "flagged: refused: " in refused["description"]
    assert refused["files"][0]["hashes"] == {}


def test_a_later_verdict_replaces_ours(tmp_path: Path) -> None:
    file = adapter(tmp_path / "a.safetensors")
    for label in ("cat", "dog"):
        probabilities = {label: 0.9, "other": 0.1}
        verdict = Prediction(label, 0.9, probabilities, 0.0, "", (label,))
        finding = Finding(str(file), verdict=verdict)
        assert len(write_sidecars(file, Reviewed(finding, ("class: dog",)), "reader")) == 2
    notes = read(tmp_path / "a.json")
    assert notes["notes"].startswith("lora_ws: dog (0.90); flagged: class: dog.")
    assert notes["lora_ws"]["verdict"]["label"] == "dog"
    assert notes["lora_ws"]["model"] == "reader"
    (tmp_path / "a.json").write_text(json.dumps({**notes, "notes": "mine now"}), encoding="utf-8")
    save_file({"a": np.zeros(3, np.float32)}, file)
    finding = Finding(str(file), sha256="0" * 64, verdict=verdict)
    write_sidecars(file, Reviewed(finding), None)
    assert read(tmp_path / "a.json")["notes"] == "mine now"
    hashes = read(tmp_path / "a.civitai.info")["files"][0]["hashes"]
    assert hashes["AutoV3"] == hashlib.sha256(bytes(12)).hexdigest()[:12].upper()
