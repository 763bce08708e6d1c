"""Bundles: the same answers after saving, refusal of what does not fit, no code on loading."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from tolerances import rounding, terms_of

from lora_ws.adapters import Layout, read_adapter
from lora_ws.bundle import Bundle
from lora_ws.cli import main
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError, DataError, LayoutError, NotAvailableError
from lora_ws.featurizers import PAPER
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.result import Fitted
from lora_ws.learn.run import fit_seed, run
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import MLP

FAST, SMALL = FitSpec(max_epochs=3), MLP(hidden=(16, 8))


@pytest.fixture
def trained(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> Callable[..., tuple]:
    store = make_zoo(n=80).save(tmp_path / "store")

    def train(kind: type) -> tuple[Prepared, Fitted, Bundle]:
        spec = ExperimentSpec(str(store), featurizer=kind(), model=SMALL, fit=FAST)
        prepared = prepare(spec)
        fitted = fit_seed(spec, prepared, 0)
        return prepared, fitted, make_bundle(fitted)

    return train


@pytest.fixture
def bundle(trained: Callable[..., tuple]) -> Bundle:
    return trained(PAPER[3])[2]


def write_adapter(path: Path, vector: np.ndarray, layout: Layout) -> Path:
    tensors = {
        f"unet.{m.layer.name}.lora.{m.role}.weight": np.array(vector[m.columns].reshape(m.shape))
        for m in layout.matrices
    }
    save_file(tensors, path)
    return path


def temperature(bundle: Bundle) -> float:
    assert bundle.confidence.calibration is not None
    return bundle.confidence.calibration.temperature


def sealed(folder: Path, info: dict[str, Any]) -> None:
    """Write what a bundle says of itself, with the hashes of its files."""
    info["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    info.pop("info_sha256", None)
    text = json.dumps(info, sort_keys=True).encode()
    info["info_sha256"] = hashlib.sha256(text).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(info), encoding="utf-8")


OLD_NAMES = {
    "abstention_rate": "rate",
    "median_alignment": "usual",
    "min_alignment": "least",
    "train_norm": "met",
}


def as_format_2(folder: Path) -> dict[str, Any]:
    """Turn a bundle's tensors into those of an MLP with its scaler; returns what goes with them."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("mean", "scale"):
        tensors[f"scaler.{name}"] = tensors.pop(f"model.normalizer.{name}")
    for name in ("centre", "scale"):
        del tensors[f"confidence.{name}"]
    save_file(tensors, folder / "model.safetensors")
    info = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    del info["width"]
    info["calibration"] = {OLD_NAMES.get(k, k): v for k, v in info["calibration"].items()}
    return {**info, "hidden": info.pop("model")["init_args"]["hidden"]}


@pytest.mark.parametrize("kind", PAPER)
def test_saved_bundle_gives_the_scores_of_the_classifier(
    trained: Callable[..., tuple], tmp_path: Path, kind: type
) -> None:
    prepared, fitted, bundle = trained(kind)
    restored = Bundle.load(bundle.save(tmp_path / "bundle"))
    rows = prepared.split.test
    logits = fitted.network(prepared.features[rows]).detach() / temperature(bundle)
    scores = logits.softmax(1).numpy()
    ours = restored.predict_proba(prepared.adapters.weights[rows], prepared.adapters.layout)
    atol = rounding(terms_of(fitted.network), size=1 + float(logits.abs().max()))
    np.testing.assert_allclose(ours, scores, rtol=0, atol=atol)
    assert restored.classes == prepared.task.classes


def test_predict_reads_files(
    bundle: Bundle, make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    zoo = make_zoo(n=80)
    file = write_adapter(tmp_path / "a.safetensors", zoo.weights[5], zoo.layout)
    classes = bundle.predict(read_adapter(file))
    assert sum(classes.values()) == pytest.approx(1, abs=rounding(len(classes)))
    assert list(classes.values()) == sorted(classes.values(), reverse=True)
    expected = bundle.predict_proba(zoo.weights[5:6])[0]
    bound = rounding(bundle.layout.size)
    assert classes[bundle.classes[1]] == pytest.approx(float(expected[1]), abs=bound)


def test_other_layouts_are_refused(bundle: Bundle) -> None:
    layout = Layout.sd15_qv()
    with pytest.raises(LayoutError, match="maps 320 to 320, expected 32 to 32"):
        bundle.predict_proba(np.zeros((1, layout.size), np.float32), layout)


def test_push_uploads_a_card_that_the_hub_reads(
    bundle: Bundle, as_hub_user: Callable[..., None], tmp_path: Path, capsys
) -> None:
    saved = str(bundle.save(tmp_path / "bundle"))
    as_hub_user()
    assert main(["push", saved, "--repo_id", "me/reader"]) == 0
    said, command = capsys.readouterr().out.splitlines()
    commit = said.rpartition(" ")[2]
    assert command.endswith(f"--model me/reader --revision {commit}")
    text = (tmp_path / "hub/models/me/reader/README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert 'from_pretrained("me/reader")' in card.text
    assert card.data.library_name == "lora_ws"
    assert "lora" in (card.data.tags or [])
    assert card.data.datasets == [Path(bundle.training["dataset"]).name]
    results = card.data.eval_results or []
    assert {r.metric_type: r.metric_value for r in results} == pytest.approx(
        bundle.training["test"], abs=5e-7
    )
    (tmp_path / "hub/models/me/many").mkdir()
    bundle.save(tmp_path / "hub/models/me/many/first")
    inside = Bundle.from_pretrained("hf://me/many/first")
    assert inside.classes == bundle.classes


def test_it_prints_as_a_line(bundle: Bundle) -> None:
    assert re.fullmatch(
        r"Bundle\(.*: 4 classes \(class0, class1, class2, \.\.\.\), .*\)", repr(bundle)
    )


def test_no_rows_give_no_scores(bundle: Bundle) -> None:
    assert bundle.predict_proba(np.empty((0, bundle.layout.size), np.float32)).shape == (0, 4)


def test_folder_holds_no_pickle(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle.save(tmp_path / "bundle")
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors",
        "bundle.json",
        "README.md",
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(name in card for name in bundle.classes)
    assert "expected calibration error" in card
    assert "MiB" in card


@pytest.mark.parametrize("damage", ["flip", "truncate", "json", "missing", "future", "classes"])
def test_damage_is_refused(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    folder = bundle.save(tmp_path / "bundle")
    model, info = folder / "model.safetensors", folder / "bundle.json"
    if damage == "flip":
        data = bytearray(model.read_bytes())
        data[-5] ^= 1
        model.write_bytes(data)
    elif damage == "truncate":
        model.write_bytes(model.read_bytes()[:100])
    elif damage == "json":
        info.write_text(info.read_text(encoding="utf-8")[:-10], encoding="utf-8")
    elif damage == "missing":
        model.unlink()
    elif damage == "classes":
        held = json.loads(info.read_text(encoding="utf-8"))
        info.write_text(json.dumps({**held, "classes": held["classes"][::-1]}), encoding="utf-8")
    else:
        info.write_text(
            json.dumps({**json.loads(info.read_text(encoding="utf-8")), "format": 99}),
            encoding="utf-8",
        )
    with pytest.raises(DataError, match=str(folder)):
        Bundle.load(folder)


def test_bundle_of_the_first_format_answers_without_calibration(
    trained: Callable[..., tuple], tmp_path: Path
) -> None:
    prepared, fitted, bundle = trained(PAPER[3])
    folder = bundle.save(tmp_path / "bundle")
    info = as_format_2(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["confidence.directions"]
    save_file(tensors, folder / "model.safetensors")
    del info["gauge"]
    sealed(folder, {**info, "format": 1, "thresholds": {}, "calibration": None})
    old = Bundle.load(folder)
    rows = prepared.split.test
    weights = prepared.adapters.weights[rows]
    logits = fitted.network(prepared.features[rows]).detach()
    atol = rounding(terms_of(fitted.network), size=1 + float(logits.abs().max()))
    scores = logits.softmax(1).numpy()
    np.testing.assert_allclose(old.predict_proba(weights), scores, rtol=0, atol=atol)
    verdict = old.predict_batch(weights[:1])[0]
    assert (verdict.label, verdict.reason) == (None, "uncalibrated")
    assert verdict.conformal_set == tuple(verdict.probabilities)
    assert "not calibrated" in old.model_card()
    again = Bundle.load(old.save(tmp_path / "again"))
    np.testing.assert_array_equal(again.predict_proba(weights), old.predict_proba(weights))


def test_bundle_of_the_second_format_says_the_same(bundle: Bundle, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((9, bundle.layout.size), dtype=np.float32)
    folder = bundle.save(tmp_path / "bundle")
    sealed(folder, {**as_format_2(folder), "format": 2})
    assert Bundle.load(folder).predict_batch(rows) == bundle.predict_batch(rows)


def test_verdicts_survive_saving(bundle: Bundle, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((20, bundle.layout.size), dtype=np.float32)
    folder = bundle.save(tmp_path / "bundle")
    assert Bundle.load(folder).predict_batch(rows) == bundle.predict_batch(rows)
    assert json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["gauge"] == "raw"
    arrays = load_file(folder / "model.safetensors").values()
    assert bundle.size_mb == pytest.approx(sum(a.nbytes for a in arrays) / 2**20)


def test_directions_of_another_width_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle.save(tmp_path / "bundle")
    tensors = load_file(folder / "model.safetensors")
    tensors["confidence.directions"] = tensors["confidence.directions"][:, 1:].copy()
    save_file(tensors, folder / "model.safetensors")
    sealed(folder, json.loads((folder / "bundle.json").read_text(encoding="utf-8")))
    with pytest.raises(DataError, match="confidence of"):
        Bundle.load(folder)


def test_no_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="no bundle here"):
        Bundle.load(tmp_path)


def test_foreign_featurizer_class_needs_trust(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle.save(tmp_path / "bundle")
    info = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    info["featurizer"] = {
        "class_path": "sklearn.preprocessing.StandardScaler",
        "init_args": {},
        "fitted": {},
    }
    sealed(folder, info)
    with pytest.raises(ConfigError, match=r"StandardScaler.*allow_classes"):
        Bundle.load(folder)
    allowed = Bundle.load(folder, allow_classes=("sklearn.preprocessing.StandardScaler",))
    assert type(allowed.featurizer).__name__ == "StandardScaler"


@pytest.mark.slow
def test_run_keeps_the_bundle_of_the_lowest_validation_loss(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    store = make_zoo(n=80).save(tmp_path / "store")
    spec = ExperimentSpec(str(store), featurizer=PAPER[2](), model=SMALL, fit=FAST, seeds=3)
    records = run(spec, tmp_path / "run")
    best = min(records, key=lambda record: record.val_loss)
    assert Bundle.load(tmp_path / "run" / "bundle").training["seed"] == best.seed


def test_bundles_go_to_the_hub_and_come_back_pinned(as_hub_user: Callable[..., None]) -> None:
    spec = ExperimentSpec(featurizer=PAPER[2](), model=SMALL, fit=FAST)
    prepared = prepare(replace(spec, subset="shared/class"))
    fitted = fit_seed(spec, prepared, 0)
    bundle = make_bundle(fitted)
    as_hub_user()
    commit = bundle.push_to_hub("me/reader")
    assert len(commit) == 40
    for name in ("hf://me/reader", f"hf://me/reader@{commit}"):
        assert Bundle.from_pretrained(name).revision == commit
    again = Bundle.from_pretrained("me/reader", revision=commit)
    assert again.revision == commit
    rows = prepared.adapters.weights[:3]
    np.testing.assert_array_equal(again.predict_proba(rows), bundle.predict_proba(rows))
    Bundle.from_pretrained("me/reader")  # notes what main stands for
    with pytest.raises(NotAvailableError, match="me/nothing does not exist, or is private"):
        Bundle.from_pretrained("me/nothing")
    for change in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        as_hub_user(**change)
        assert Bundle.from_pretrained("me/reader").revision == commit
    as_hub_user(HF_TOKEN="")
    with pytest.raises(NotAvailableError, match="me/other wants a login"):
        bundle.push_to_hub("me/other")
