"""Classifiers of scikit-learn in experiments: records, bundles, choices by validation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from lora_ws.bundle import Bundle
from lora_ws.collection import AdapterSet
from lora_ws.config import parse
from lora_ws.errors import ConfigError
from lora_ws.featurizers import StatsFlatVec, UpdateKernel
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import pack
from lora_ws.learn.run import fit_seeds, run, run_one
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.models import DeepSets, ProbeX
from lora_ws.models.gaussian_process import GaussianProcess


@pytest.fixture
def spec(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> ExperimentSpec:
    store = str(make_zoo(n=80).save(tmp_path / "store"))
    logistic = LogisticRegression(max_iter=1000)
    return ExperimentSpec(store, featurizer=StatsFlatVec(), model=logistic, seeds=1)


def standard(spec: ExperimentSpec) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Standardised features, labels and parts, by scikit-learn."""
    prepared = prepare(spec)
    rows = np.asarray(prepared.features, float)
    scaler = StandardScaler().fit(rows[prepared.split.train])
    # Theirs divides by n, ours by n - 1.
    n = len(prepared.split.train)
    return scaler.transform(rows) * np.sqrt((n - 1) / n), prepared.labels, prepared.split


def test_record_and_bundle_are_those_of_scikit_learn(spec: ExperimentSpec, tmp_path: Path) -> None:
    (record,) = run(spec, tmp_path / "run")
    rows, labels, (train, val, test) = standard(spec)
    fitted = clone(spec.model).fit(rows[train], labels[train])
    guess = fitted.predict_proba(rows[test])
    assert record.test["accuracy"] == pytest.approx(accuracy_score(labels[test], guess.argmax(1)))
    auroc = roc_auc_score(labels[test], guess, multi_class="ovr")
    # The solver stops at gradients of 1e-4, its ``tol``, wherever that is for features in float32
    # and in float64: a bound on where, not on rounding.
    assert record.test["auroc"] == pytest.approx(auroc, abs=1e-4)
    loss = log_loss(labels[val], fitted.predict_proba(rows[val]), labels=range(4))
    assert record.val_loss == pytest.approx(loss, rel=1e-3)
    assert (record.model, record.engine) == (
        "LogisticRegression(max_iter=1000)",
        "scikit-learn-cpu",
    )
    assert record.name == "StatsFlatVec > LogisticRegression(max_iter=1000)"

    bundle = Bundle.load(tmp_path / "run" / "bundle")
    assert bundle.confidence.calibration is not None
    weights = prepare(spec).adapters.weights[test]
    named = [bundle.classes[k] for k in fitted.predict(rows[test])]
    found = bundle.predict_proba(weights).argmax(1)
    assert [bundle.classes[k] for k in found] == named


@pytest.mark.slow
def test_what_no_tensors_can_hold_is_measured_and_said(
    spec: ExperimentSpec, tmp_path: Path
) -> None:
    forest = replace(spec, model=RandomForestClassifier(n_estimators=20), seeds=2)
    records = run(forest, tmp_path / "run")
    assert records[0].test != records[1].test or records[0].val_loss != records[1].val_loss
    assert run_one(forest, 1).timeless() == records[1].timeless()  # the seed decides
    assert not (tmp_path / "run" / "bundle").exists()
    why = (tmp_path / "run" / "no_bundle.txt").read_text(encoding="utf-8")
    assert "RandomForestClassifier cannot be stored as tensors" in why


@pytest.mark.slow
def test_validation_chooses_and_the_record_says_what(
    spec: ExperimentSpec, make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    faint = make_zoo(n=80, signal=0.2).save(tmp_path / "faint")
    kernel = replace(
        spec,
        dataset=str(faint),
        featurizer=UpdateKernel(kernel="left"),
        model=SVC(kernel="precomputed"),
        choose={"featurizer.whiten": [None, 0.5], "model.C": [1e-6, 1.0]},
    )
    (record,) = run(kernel, tmp_path / "run")
    assert record.name == "UpdateKernel(kernel=left) > SVC(kernel=precomputed)"
    each = {}
    for whiten in (None, 0.5):
        for c in (1e-6, 1.0):
            one = replace(
                kernel,
                featurizer=UpdateKernel(kernel="left", whiten=whiten),
                model=SVC(kernel="precomputed", C=c),
                choose={},
            )
            each[whiten, c] = run_one(one, 0)
    best = max(each, key=lambda key: each[key].val["auroc"])
    assert record.chosen == {"featurizer.whiten": best[0], "model.C": best[1]}
    assert record.test == each[best].test
    assert len({one.val["auroc"] for one in each.values()}) > 1
    bundle = Bundle.load(tmp_path / "run" / "bundle")
    assert bundle.featurizer.whiten == best[0]
    assert bundle.gauge == "invariant"
    # The folder goes on with the same choices, and refuses others.
    assert run(kernel, tmp_path / "run") == [record]
    with pytest.raises(ConfigError, match=r"another `choose"):
        run(replace(kernel, choose={"model.C": [3.0]}), tmp_path / "run")


@pytest.mark.slow
def test_each_seed_chooses_its_module(
    spec: ExperimentSpec, make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    """Modules of two widths, told apart by the first 600 numbers, which only one of them has."""
    store = make_zoo(n=60).save(tmp_path / "adapters")
    modules = [["down_blocks.0.attentions.0*attn1.to_q"], ["mid_block*.attn2.to_q"]]
    one = ExperimentSpec(
        dataset=str(store),
        model=ProbeX(probes=2, width=4),
        fit=FitSpec(max_epochs=2, lr=0.01),
        choose={"matrices": modules},
        seeds=3,
    )
    records = run(one, tmp_path / "run", full=False)
    alone = [
        [run_one(replace(one, matrices=tuple(names), choose={}), seed) for names in modules]
        for seed in range(3)
    ]
    for record, pair in zip(records, alone, strict=True):
        best = max(pair, key=lambda found: found.val["auroc"])
        assert record.chosen == {"matrices": modules[pair.index(best)]}
        assert (record.dim, record.test) == (best.dim, best.test)
    assert len({record.dim for found in alone for record in found}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": PCA()},
            "a network, or a classifier or regressor of scikit-learn, got PCA",
        ),
        ({"trainer": TrainerSpec(engine="batched")}, "one-by-one with model LogisticRegression"),
        ({"trainer": TrainerSpec(devices=2)}, "expected 1 with model LogisticRegression"),
        ({"choose": {"model.D": [1]}}, r"choose\.model\.D: no `D` in LogisticRegression"),
        ({"choose": {"seeds": [1]}}, "choose: expected keys of model"),
        ({"model": DeepSets()}, "DeepSets reads the factors themselves, got featurizer StatsFlat"),
        ({"matrices": ("*",), "featurizer": StandardScaler()}, "takes `matrices`, got StandardSc"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    spec: ExperimentSpec, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(spec, **changes)


@pytest.mark.parametrize("model", [LogisticRegression(), DummyClassifier()])
def test_a_task_without_classes_is_refused(spec: ExperimentSpec, model: BaseEstimator) -> None:
    with pytest.raises(ConfigError, match="a network or a regressor for task=regression"):
        replace(spec, task="regression", label="size", model=model)
    with pytest.raises(ConfigError, match="expected a network for task=embedding, got Ridge"):
        replace(spec, task="embedding", model=Ridge())


@pytest.mark.parametrize("model", [KernelRidge(50, kernel="precomputed"), GaussianProcess()])
def test_regressors_read_classes_and_numbers(
    spec: ExperimentSpec,
    model: BaseEstimator,
    make_zoo: Callable[..., AdapterSet],
    tmp_path: Path,
) -> None:
    """Against scikit-learn's kernel ridge on the same kernel, with the ratio that is its alpha."""
    zoo = make_zoo(n=60)
    counts = pa.array(np.arange(60) % 4 + 0.5)
    store = replace(zoo, rows=zoo.rows.append_column("count", counts)).save(tmp_path / "counts")
    kernel = replace(spec, dataset=str(store), featurizer=UpdateKernel(kernel="left"), model=model)
    for task, label in (("classification", None), ("regression", "count")):
        one = replace(kernel, task=task, label=label)
        prepared = prepare(one)
        (found,) = fit_seeds(one, prepared, [0])
        train, _, test = prepared.split
        rows = np.asarray(prepared.features, float)
        numbers = prepared.task.numbers(prepared.labels)
        mean = numbers[train].mean(axis=0)
        alpha = getattr(clone(model).fit(rows[train], numbers[train] - mean), "ratio_", 50)
        ridge = KernelRidge(alpha=alpha, kernel="precomputed")
        wanted = ridge.fit(rows[train], numbers[train] - mean).predict(rows[test]) + mean
        if task == "classification":
            hits = accuracy_score(prepared.labels[test], wanted.argmax(1))
            assert found.record.test["accuracy"] == pytest.approx(hits)
            pack(found, tmp_path / "bundle")
            bundle = Bundle.load(tmp_path / "bundle")
            guess = bundle.predict_proba(prepared.adapters.weights[test]).argmax(1)
            np.testing.assert_array_equal(guess, wanted.argmax(1))
        else:
            spread, truth = prepared.task.std_, prepared.labels[test]
            error = np.abs(wanted[:, 0] * spread + prepared.task.mean_ - truth).mean()
            assert found.record.test["mae"] == pytest.approx(error, rel=1e-4)


def test_a_classifier_is_found_by_name_and_a_kernel_machine_reads_updates() -> None:
    read = parse(ExperimentSpec, ["--model", "SVC", "--model.kernel", "precomputed"], "train")()
    assert isinstance(read.model, SVC)
    assert isinstance(read.featurizer, UpdateKernel)
    ridge = parse(ExperimentSpec, ["--model", "KernelRidge", "--model.alpha", "2"], "train")()
    assert (ridge.model.alpha, ridge.featurizer) == (2, None)
    process = parse(ExperimentSpec, ["--model", "GaussianProcess"], "train")()
    assert isinstance(process.featurizer, UpdateKernel)
    assert ExperimentSpec(model=SVC()).featurizer is None
    assert ExperimentSpec(model=SVC(kernel="precomputed"), metadata=("rank",)).featurizer is None
