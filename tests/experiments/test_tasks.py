"""Principal components: one decomposition serves every K, and K above the rank is said so."""

from dataclasses import replace
from pathlib import Path

import pytest
from factories import small_zoo

from lora_ws.errors import ConfigError, TrainingError
from lora_ws.experiments.tasks import NOT_APPLICABLE, Task, perform, read, run_tasks
from lora_ws.featurizers import FlatVecPCA
from lora_ws.functional import gram_pca
from lora_ws.learn.run import run_one
from lora_ws.learn.spec import ExperimentSpec, FitSpec

FAST = FitSpec(hidden=(16,), lr=1e-2, max_epochs=6, patience=6)


@pytest.fixture
def spec(tmp_path: Path) -> ExperimentSpec:
    store = small_zoo().save(tmp_path / "store")
    return ExperimentSpec(str(store), featurizer=FlatVecPCA(), fit=FAST, seeds=2)


def test_every_k_equals_a_fit_of_its_own(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fits = []
    whole = gram_pca._gram_eigenpairs
    monkeypatch.setattr(
        gram_pca, "_gram_eigenpairs", lambda *args: fits.append(args[-1]) or whole(*args)
    )
    task = Task(spec, tmp_path / "k", components=(2, 5, 40, 63))
    perform(task)
    assert fits == [40], "one decomposition, of the largest K that applies"
    for k in (2, 5, 40):
        records = read(tmp_path / "k" / f"k{k}", seeds=99)
        own = run_one(spec.vary(n_components=k), 1)
        assert records[1].val_loss == pytest.approx(own.val_loss, rel=1e-3)
        assert (records[1].dim, records[1].name) == (k, f"FlatVecPCA(n_components={k})")
    # Four layers have 48 numbers, 63 training rows a rank of 62.
    assert (tmp_path / "k" / "k63" / NOT_APPLICABLE).read_text(
        encoding="utf-8"
    ) == "not applicable: rank 48\n"
    assert task.done == task.total == 6


def test_a_failed_task_says_why_and_keeps_the_rest(spec: ExperimentSpec, tmp_path: Path):
    good = Task(spec.vary(n_components=3), tmp_path / "good")
    bad = Task(spec.vary(n_components=1000), tmp_path / "bad")
    with pytest.raises(TrainingError, match=r"n_components=1000.*what was finished is kept"):
        run_tasks([good, bad, Task(spec, tmp_path / "more")], 2, "test")


def test_what_is_done_is_not_done_again(spec: ExperimentSpec, tmp_path: Path):
    task = Task(spec, tmp_path / "run")
    run_tasks([task, task], 2, "test")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    run_tasks([task], 2, "test")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()} == before


def test_a_finished_run_of_another_experiment_is_refused(spec: ExperimentSpec, tmp_path: Path):
    run_tasks([Task(spec, tmp_path / "run")], 1, "test")
    other = Task(replace(spec, fit=replace(FAST, lr=1.0)), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another `fit\.lr` \(0\.01, now 1\.0\)"):
        run_tasks([other], 1, "test")


def test_records_are_those_of_the_seeds_asked_for(spec: ExperimentSpec, tmp_path: Path):
    run_tasks([Task(spec, tmp_path / "run")], 1, "test")
    fewer = Task(replace(spec, seeds=1), tmp_path / "run")
    run_tasks([fewer], 1, "test")
    assert [record.seed for record in fewer.records] == [0]
