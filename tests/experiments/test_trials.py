"""Principal components: one decomposition serves every K, and K above the rank is said so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import small_zoo
from tolerances import rounding

from lora_ws.errors import ConfigError, TrainingError
from lora_ws.experiments.trials import NOT_APPLICABLE, Trial, first_records, perform, run_trials
from lora_ws.featurizers import FlatVecPCA
from lora_ws.functional import gram_pca
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.run import fit_seed, run
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import MLP

FAST = FitSpec(lr=1e-2, max_epochs=6, patience=6)


@pytest.fixture
def spec(tmp_path: Path) -> ExperimentSpec:
    store = small_zoo().save(tmp_path / "store")
    return ExperimentSpec(
        str(store), featurizer=FlatVecPCA(), model=MLP(hidden=(16,)), fit=FAST, seeds=2
    )


def test_every_k_equals_a_fit_of_its_own(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fits = []
    whole = gram_pca._eigenpairs
    monkeypatch.setattr(
        gram_pca, "_eigenpairs", lambda *args: fits.append(args[-1]) or whole(*args)
    )
    few: dict[int, Prepared] = {}

    def noted(own: ExperimentSpec, folder: Path, *, prepared: Prepared, **more: Any) -> Any:
        few[prepared.inputs.width] = prepared
        return run(own, folder, prepared=prepared, **more)

    monkeypatch.setattr("lora_ws.experiments.trials.run", noted)
    trial = Trial(spec, tmp_path / "k", components=(2, 5, 40, 63))
    perform(trial)
    assert fits == [40], "one decomposition, of the largest K that applies"
    for k in (2, 5, 40):
        records = first_records(tmp_path / "k" / f"k{k}", seeds=99)
        # The features but for rounding, and exactly what is trained on them.
        given, own = few[k], prepare(spec.vary(n_components=k))
        atol = rounding(len(own.labels), size=float(abs(own.features).max()))
        torch.testing.assert_close(given.features, own.features, rtol=0, atol=atol)
        alone = fit_seed(spec.vary(n_components=k), given, 1).record
        assert records[1].timeless() == alone.timeless()
        assert (records[1].dim, records[1].name) == (k, f"FlatVecPCA(n_components={k})")
    # Four layers have 48 numbers, 63 training rows have a rank of 62.
    assert (tmp_path / "k" / "k63" / NOT_APPLICABLE).read_text(
        encoding="utf-8"
    ) == "not applicable: rank 48\n"
    assert trial.done() == trial.total() == 6


@pytest.mark.slow
def test_a_failed_trial_says_why_and_keeps_the_rest(spec: ExperimentSpec, tmp_path: Path):
    good = Trial(spec.vary(n_components=3), tmp_path / "good")
    bad = Trial(spec.vary(n_components=1000), tmp_path / "bad")
    with pytest.raises(TrainingError, match=r"n_components=1000.*what was finished is kept"):
        run_trials([good, bad, Trial(spec, tmp_path / "more")], 2, "test")


def test_what_is_done_is_not_done_again(spec: ExperimentSpec, tmp_path: Path):
    trial = Trial(spec, tmp_path / "run")
    run_trials([trial, trial], 2, "test")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    run_trials([trial], 2, "test")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()} == before


def test_a_finished_run_of_another_experiment_is_refused(spec: ExperimentSpec, tmp_path: Path):
    run_trials([Trial(spec, tmp_path / "run")], 1, "test")
    other = Trial(replace(spec, fit=replace(FAST, lr=1.0)), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another `fit\.lr` \(0\.01, now 1\.0\)"):
        run_trials([other], 1, "test")


def test_records_are_those_of_the_seeds_asked_for(spec: ExperimentSpec, tmp_path: Path):
    run_trials([Trial(spec, tmp_path / "run")], 1, "test")
    fewer = Trial(replace(spec, seeds=1), tmp_path / "run")
    run_trials([fewer], 1, "test")
    assert [record.seed for record in fewer.records()] == [0]
