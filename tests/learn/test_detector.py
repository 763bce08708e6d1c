"""`lora-ws detector`: folders to a bundle and a policy; what is too little is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from factories import write_adapter
from safetensors.numpy import load_file, save_file
from scipy.linalg import subspace_angles

from lora_ws.adapters import Layout
from lora_ws.audit.policy import Policy
from lora_ws.cli import main
from lora_ws.collection import load
from lora_ws.config import load_spec
from lora_ws.errors import ConfigError, DataError
from lora_ws.learn.confounds import file_facts, find_confounds
from lora_ws.learn.detector import DetectorSpec, make_detector
from lora_ws.learn.detector_card import told_left_out
from lora_ws.learn.starts import joined, start_groups

KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}


def write_noise(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for k in range(count):
        vector = rng.standard_normal(20, dtype=np.float32)
        write_adapter(folder / f"{k}.safetensors", vector)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_starts_are_told_by_the_rows_of_a(rank: int):
    layout, rng = Layout.known("tiny_sd_qv").at_rank(rank), np.random.default_rng(0)
    rows = rng.standard_normal((4, layout.size), dtype=np.float32)
    for _, down, up in layout.pairs():
        rows[3, down] = rows[1, down] + 0.05 * rng.standard_normal(down.stop - down.start)
        rows[3, up] = rng.standard_normal(up.stop - up.start)
    assert start_groups(rows, layout).tolist() == [0, 1, 2, 1]
    layer, down, _ = next(iter(layout.pairs()))
    for other, alike in ((3, True), (2, False)):
        a, b = (rows[k, down].reshape(layer.down_shape).T for k in (1, other))
        share = (np.cos(subspace_angles(a, b)) ** 2).mean()
        assert (share > 0.5) == alike


def test_joined_groups_hold_whole_groups_of_each():
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 9, 20), rng.integers(0, 9, 20)
    found = joined(one, two)
    for labels in (one, two):
        assert all(len(set(found[labels == value])) == 1 for value in labels)


@pytest.mark.parametrize("classes", [2, 3])
def test_facts_that_tell_folders_apart_are_named(classes: int):
    rng, per = np.random.default_rng(0), 20
    labels = np.repeat(np.arange(classes), per)
    chance = rng.permutation(labels)
    facts = [
        {"base": "SD1.x", "rank": 4.0 + k, "trainer": "kohya" if k else "PEFT", "size": float(c)}
        for k, c in zip(labels, chance, strict=True)
    ]
    groups = np.arange(len(labels))
    found = find_confounds(facts, groups, labels, groups)
    assert [one.what for one in found] == ["rank", "trainer"]
    assert (found[0].share, found[0].largest) == (1.0, pytest.approx(1 / classes))
    # One start for each folder tells it; one for all, or one for each file, does not.
    for starts, named in ((labels, True), (0 * labels, False), (groups, False)):
        told = [one.what for one in find_confounds(facts, starts, labels, groups)]
        assert ("a start in common" in told) == named


def test_what_headers_claim_of_training_is_tried(tmp_path: Path):
    facts = []
    for k in range(40):
        file = tmp_path / f"{k}.safetensors"
        write_noise(tmp_path, 1, k)
        tensors = load_file(tmp_path / "0.safetensors")
        save_file(tensors, file, {"ss_learning_rate": "1e-4" if k < 20 else "5e-5"})
        facts.append(file_facts(file))
    labels, groups = np.repeat([0, 1], 20), np.arange(40)
    (found,) = find_confounds(facts, groups, labels, groups)
    assert (found.what, found.share, found.files) == ("`ss_learning_rate` in the header", 1.0, 40)


def test_files_left_out_are_told_by_reason():
    lost = {f"bad/{k}.safetensors": "of another base" for k in range(7)} | {"good/a.pt": "a pickle"}
    names = ", ".join(f"bad/{k}.safetensors" for k in range(5))
    told = told_left_out(lost)
    assert told == [f"{names} and 2 more: of another base", "good/a.pt: a pickle"]


def test_too_little_is_said(tmp_path: Path):
    write_noise(tmp_path / "good", 12, 0)
    write_noise(tmp_path / "bad", 4, 1)
    # Classes are the folders, whatever lies beside the files.
    (tmp_path / "bad" / "metadata.json").write_text('{"category_label": "fish"}', encoding="utf-8")
    out = DetectorSpec(out=tmp_path / "out")
    with pytest.raises(ConfigError, match="expected two folders or more"):
        make_detector([tmp_path / "good"], out)
    with pytest.raises(DataError, match=r"`bad`: expected at least 10 .* got 4 among 4 files"):
        make_detector([tmp_path / "good", tmp_path / "bad"], out)
    content = (tmp_path / "good" / "3.safetensors").read_bytes()
    (tmp_path / "bad" / "twin.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="are one adapter in two folders"):
        make_detector([tmp_path / "good", tmp_path / "bad"], out)
    assert not out.out.exists()


def write_kinds(root: Path, count: int) -> None:
    """Adapters of lora-ws-mini in ranks 1, 2 and 4, spelt as kohya, PEFT and diffusers do."""
    zoo, rng = load("lora-ws-mini", subset="per_adapter/class"), np.random.default_rng(0)
    labels = zoo.column("category_label")
    for folder, label in (("good", "flower"), ("bad", "reptile")):
        chosen = rng.permutation(np.flatnonzero(labels == label))[: count + 5]
        for k, row in enumerate(chosen):
            rank, style = (1, 2, 4)[k % 3], k // 3 % 3
            tensors = spelt(zoo.weights[row], zoo.layout, rank, style, rng)
            file = root / (folder if k < count else "mixed") / f"{folder}{k}.safetensors"
            if style == 1:
                file = file.with_suffix("") / "adapter_model.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            if style == 1:
                config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
                text = json.dumps({**config, "target_modules": ["to_q", "to_v"]})
                (file.parent / "adapter_config.json").write_text(text, encoding="utf-8")
            save_file(tensors, file)


def spelt(
    row: np.ndarray, layout: Layout, rank: int, style: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    found = {}
    for layer, down, up in layout.pairs():
        mix = rng.standard_normal((layer.rank, rank)).astype(np.float32)
        a = np.linalg.pinv(mix) @ row[down].reshape(layer.down_shape)
        both = {"down": a, "up": row[up].reshape(layer.up_shape) @ mix}
        for role, value in both.items():
            kohya = f"lora_unet_{layer.name.replace('.', '_')}.{KOHYA[role]}"
            peft = f"base_model.model.{layer.name}.{PEFT[role]}"
            name = (kohya, peft, f"unet.{layer.name}.lora.{role}.weight")[style]
            found[name] = np.ascontiguousarray(value, np.float32)
    return found


@pytest.mark.slow
def test_two_commands_from_folders_to_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_kinds(tmp_path, 25)
    assert main(["detector", "good", "bad", "--out", "detector"]) == 0
    assert "What was not tested: " in capsys.readouterr().out
    assert list(load_spec(Policy, tmp_path / "detector" / "policy.yaml").classes) == ["bad"]
    card = (tmp_path / "detector" / "README.md").read_text(encoding="utf-8")
    assert "## What was not tested" in card
    assert main(["scan", "mixed", "--model", "detector", "--csv", "found.csv"]) == 3
    assert "flags are by detector/policy.yaml" in capsys.readouterr().out
    with (tmp_path / "found.csv").open(encoding="utf-8") as opened:
        lines = list(csv.DictReader(opened))
    flagged = {line["file"] for line in lines if line["flags"]}
    assert len(lines) == 10
    # Of five each, a fair coin would err far more.
    assert sum("/bad" in name for name in flagged) >= 4
    assert sum("/good" in name for name in flagged) <= 1
