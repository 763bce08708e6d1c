"""`inspect` and `convert` as users meet them, and verdicts on a file in other spellings."""

import json
from pathlib import Path

import numpy as np
import pytest
from factories import write_adapter
from safetensors.numpy import load_file, save_file

from lora_ws import load
from lora_ws.cli import main

LAYERS = (
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 768, 4),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 4, 4),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).standard_normal(780, dtype=np.float32)
    return write_adapter(tmp_path / "a.safetensors", values, LAYERS)


def test_inspect_tells_base_ranks_scales_and_norm(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(file)
    tensors["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.alpha"] = np.float32(2)
    tensors["<token>"] = np.ones(3, np.float32)
    metadata = {"ss_output_name": "<b>[red]name", "other": "x"}
    save_file({k: np.asarray(v) for k, v in tensors.items()}, file, metadata)
    assert main(["inspect", str(file), "--as_json", "true"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base"] == "SD1.x"
    assert facts["scales"] == {"2 (alpha tensor)": 1, "1 (none given, so 1)": 1}
    stem = "unet.mid_block.attentions.0.transformer_blocks.0."
    products = [
        scale * tensors[f"{stem}{name}.lora.up.weight"] @ tensors[f"{stem}{name}.lora.down.weight"]
        for name, scale in (("attn2.to_v", 2), ("attn1.to_q", 1))
    ]
    expected = np.sqrt(sum(np.square(product.astype(float)).sum() for product in products))
    assert facts["norm"] == pytest.approx(expected, rel=1e-5)
    assert facts["claims"] == {"ss_output_name": "<b>[red]name"}
    assert facts["odd"] == ["1 tensors are no part of an update, such as <token>"]
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "ss_output_name: <b>[red]name" in shown


def test_a_file_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    assert main(["inspect", str(tmp_path / "page.safetensors")]) == 2
    assert "page.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_a_converted_file_gets_the_verdict_of_the_first(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = load("lora-ws-mini", subset="shared/class")
    layers = tuple((s.name, s.in_features, s.out_features) for s in zoo.layout.layers)
    first = write_adapter(tmp_path / "first.safetensors", zoo.weights[0], layers)
    run = ["train", "--featurizer", "StatsFlatVec", "--subset", "shared/class", "--seeds", "1"]
    assert main([*run, "--fit.max_epochs", "2", "--out", str(tmp_path / "run")]) == 0
    assert main(["convert", str(first), str(tmp_path / "out"), "--to", to]) == 0
    converted = tmp_path / "out" if to == "peft" else tmp_path / "out" / "first.safetensors"
    verdicts = []
    for path in (first, converted):
        capsys.readouterr()
        judged = ["predict", str(path), "--model", str(tmp_path / "run" / "bundle")]
        assert main([*judged, "--as_json", "true"]) == 0
        verdicts.append(json.loads(capsys.readouterr().out))
    assert verdicts[0].pop("file") != verdicts[1].pop("file")
    assert verdicts[0] == verdicts[1]
