"""A network in a file outside the package takes part in everything, by its dotted path alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from factories import small_zoo
from hub_server import HubServer
from safetensors.numpy import save_file
from tolerances import rounding

from lora_ws.bundle import Bundle
from lora_ws.cli import main
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.report.records import read_records

NETWORK = "size_net.SizeNet"
ALLOWED = ["--allow_classes", f'["{NETWORK}"]']
FAST = ["--fit.max_epochs", "6", "--fit.lr", "3e-3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network alone."""
    folder = tmp_path_factory.mktemp("theirs")
    shutil.copy(Path(__file__).with_name("size_net.py"), folder)
    return folder


@pytest.fixture
def zoo(make_zoo: Callable[..., AdapterSet]) -> AdapterSet:
    return make_zoo(n=80)


@pytest.fixture
def work(home: Path, zoo: AdapterSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store and an adapter file, from which the network can be imported."""
    zoo.save(tmp_path / "store")
    tensors = {
        f"unet.{m.layer.name}.lora.{m.role}.weight": np.array(
            zoo.weights[7, m.columns].reshape(m.shape)
        )
        for m in zoo.layout.matrices
    }
    save_file(tensors, tmp_path / "one.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def run(*words: str) -> None:
    assert main(list(words)) == 0


def train(*more: str) -> None:
    run("train", "--dataset", "store", "--model", NETWORK, "--model.width", "16", *FAST, *more)


@pytest.mark.slow
def test_train_evaluate_predict_and_scan(
    work: Path, zoo: AdapterSet, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--seeds", "2", "--out", "run")
    capsys.readouterr()
    (folder,) = (work / "run").glob("FlatVec-SizeNet*")
    records = read_records(folder / "records.jsonl")
    assert [record.model for record in records] == ["SizeNet(width=16)"] * 2
    assert {record.name for record in records} == {"FlatVec > SizeNet(width=16)"}
    assert np.mean([record.test["accuracy"] for record in records]) > 0.5  # chance is 0.25
    assert (folder / "curves.png").is_file()

    with pytest.raises(ConfigError, match=r"`size_net\.SizeNet` is not part of lora_ws.*allow"):
        Bundle.load("run/bundle")
    run("evaluate", "--model", "run/bundle", "--dataset", "store", *ALLOWED)
    assert "accuracy" in capsys.readouterr().out
    run("predict", "one.safetensors", "--model", "run/bundle", "--as_json", "true", *ALLOWED)
    told = json.loads(capsys.readouterr().out)
    expected = Bundle.load("run/bundle", allow_classes=(NETWORK,)).predict_proba(zoo.weights[7:8])
    bound = rounding(zoo.layout.size)
    assert sorted(told["probabilities"].values()) == pytest.approx(sorted(expected[0]), abs=bound)
    scan = ["scan", "one.safetensors", "--model", "run/bundle", "--cache", "cache"]
    run(*scan, "--json", "found.jsonl", *ALLOWED)
    (line,) = (work / "found.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert found["verdict"]["probabilities"] == pytest.approx(told["probabilities"], abs=bound)
    # An invariant network, so that what projecting changes is nothing to it; every layer speaks.
    assert Bundle.load("run/bundle", allow_classes=(NETWORK,)).gauge == "invariant"
    if found["verdict"]["label"]:
        assert set(found["evidence"]) == {layer.name for layer in zoo.layout.layers}


@pytest.mark.slow
def test_it_resumes_and_sweeps_over_layers(work: Path) -> None:
    train("--seeds", "1", "--out", "run")
    (file,) = (work / "run").glob("FlatVec-SizeNet*/records.jsonl")
    first = file.read_bytes()
    train("--seeds", "2", "--out", "run")
    assert file.read_bytes().startswith(first)
    assert len(read_records(file)) == 2
    small_zoo().save(work / "small")
    sweep = ["sweep", "--dataset", "small", "--model", NETWORK, *FAST, "--seeds", "1"]
    run(*sweep, "--processes", "1", "--over", "layers", "--out", "layers")
    found = {
        file.parent.name: read_records(file)[0] for file in (work / "layers").rglob("records.jsonl")
    }
    assert {name: record.dim for name, record in found.items()} == {
        "down.attn1.to_q": 12,
        "down.attn2.to_v": 11,
        "mid.attn2.to_v": 13,
        "up.attn1.to_v": 12,
    }
    # The one layer that tells the class, of whose B alone the network needs.
    best = max(found, key=lambda name: found[name].val["auroc"])
    assert best == "mid.attn2.to_v"


@pytest.mark.slow
def test_it_trains_in_stacks(work: Path) -> None:
    stacked = ["--trainer.engine", "batched", "--trainer.accelerator", "cpu"]
    train("--seeds", "2", "--out", "run", *stacked)
    (file,) = (work / "run").glob("FlatVec-SizeNet*/records.jsonl")
    assert {record.engine for record in read_records(file)} == {"batched-cpu"}


@pytest.mark.slow
def test_two_processes_train_it(work: Path) -> None:
    devices = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    command = [sys.executable, "-m", "lora_ws", "train", "--dataset", "store", "--model", NETWORK]
    ran = subprocess.run(
        [*command, *FAST, "--seeds", "1", "--out", "two", *devices],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    run("train", "--dataset", "store", "--model", NETWORK, *FAST, "--seeds", "1", "--out", "one")
    (two,), (one,) = (
        read_records(next((work / name).glob("*/records.jsonl"))) for name in ("two", "one")
    )
    assert two.engine == "lightning-cpu-ddp2"
    # How near two processes come to one is measured in test_ddp: here, that they train the same.
    assert two.val_loss == pytest.approx(one.val_loss, rel=1e-3)
    assert Bundle.load("two/bundle", allow_classes=(NETWORK,)).classes == one.classes


HUB = """
from lora_ws import Bundle
bundle = Bundle.load("run/bundle", allow_classes=("size_net.SizeNet",))
commit = bundle.push_to_hub("me/sizes")
try:
    Bundle.from_pretrained("me/sizes", revision=commit)
except Exception as error:
    assert "allow_classes" in str(error), error
else:
    raise AssertionError("a class of others was imported")
again = Bundle.from_pretrained("me/sizes", revision=commit, allow_classes=("size_net.SizeNet",))
import numpy
rows = numpy.load("store/weights.npy")[:5]
assert (again.predict_proba(rows) == bundle.predict_proba(rows)).all()
print(commit)
"""


@pytest.mark.slow
def test_its_bundle_goes_to_the_hub_and_back(
    work: Path, server: HubServer, hub_env: Callable[..., dict[str, str]]
) -> None:
    train("--seeds", "1", "--out", "run")
    ran = subprocess.run(
        [sys.executable, "-c", HUB], env=hub_env(), capture_output=True, encoding="utf-8"
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.strip()) == 40
