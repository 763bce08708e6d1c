"""Seeds fitted again on training and validation rows, and what folds say of their confidence."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from lora_ws.bundle import Bundle
from lora_ws.bundle.card import OUT_OF_FOLD
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.featurizers import UpdateKernel
from lora_ws.functional.calibrate import fit_temperature
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import pack
from lora_ws.learn.refit import FOLDS
from lora_ws.learn.run import fit_seeds
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.models import MLP
from lora_ws.models.gaussian_process import GaussianProcess
from lora_ws.models.one_vs_rest import OneVsRestSVC


def decisions(layout: Any, weights: Any, labels: Any, train: Any, asked: Any) -> np.ndarray:
    """Featurizer and classifier fitted on some rows, by hand, and asked about others."""
    kernel = UpdateKernel(layout=layout, kernel="left")
    gram = kernel.fit_transform(np.asarray(weights[train]), labels[train])
    machine = OneVsRestSVC().fit(gram, labels[train])
    return machine.decision_function(kernel.transform(np.asarray(weights[asked])))


def test_it_is_the_fit_of_all_known_rows_and_folds_calibrate_it(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    store = str(make_zoo(n=60, signal=0.25).save(tmp_path / "store"))
    spec = ExperimentSpec(store, featurizer=UpdateKernel(kernel="left"), model=OneVsRestSVC())
    prepared = prepare(spec)
    ((once,), (again,)) = (
        fit_seeds(one, prepared, [0]) for one in (spec, replace(spec, refit=True))
    )
    weights, labels, split = prepared.adapters.weights, prepared.labels, prepared.split
    known = np.sort(np.concatenate([split.train, split.val]))
    told = prepared.adapters.layout, weights, labels
    found = decisions(*told, known, split.test)
    hits = (found.argmax(axis=1) == labels[split.test]).mean()
    assert again.record.test["accuracy"] == pytest.approx(hits)
    assert (again.record.n_train, again.record.dim) == (len(known), len(known))
    # What the first fit did on the validation rows stays what was chosen by.
    assert (again.record.val, again.record.val_loss) == (once.record.val, once.record.val_loss)
    assert again.record.to_dict()["refit"] is True
    assert "refit" not in once.record.to_dict()

    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    logits, truth = [], []
    for train, asked in folds.split(known, labels[known], np.arange(len(known))):
        logits.append(decisions(*told, known[train], known[asked]))
        truth.append(labels[known[asked]])
    smoothing = 1 / (len(known) + 1)
    temperature = fit_temperature(
        np.concatenate(logits), np.concatenate(truth), smoothing=smoothing
    )
    pack(again, tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    calibration = bundle.confidence.calibration
    assert calibration is not None
    assert (calibration.rows, calibration.out_of_fold) == (len(known), True)
    # The network adds in float32, so the minimum is as flat as its rounding.
    assert calibration.temperature == pytest.approx(temperature, rel=1e-3)
    assert OUT_OF_FOLD in (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    probabilities = bundle.predict_proba(np.asarray(weights[split.test]))
    expected = np.exp(found / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)


def test_known_and_new_rows_of_folds_are_as_large_as_those_of_the_whole(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    """Folds have fewer columns: without their growth every new row would seem too large."""
    store = str(make_zoo(n=60).save(tmp_path / "store"))
    spec = ExperimentSpec(
        store, featurizer=UpdateKernel(kernel="left"), model=GaussianProcess(), refit=True
    )
    prepared = prepare(spec)
    (found,) = fit_seeds(spec, prepared, [0])
    pack(found, tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    rows = np.asarray(prepared.adapters.weights[prepared.split.test])
    reasons = [one.reason for one in bundle.predict_batch(rows)]
    assert reasons.count("") >= 0.75 * len(rows)


def test_networks_that_stop_by_validation_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"refit: expected a classifier or regressor.*MLP"):
        ExperimentSpec(featurizer=UpdateKernel(), model=MLP(), refit=True)
