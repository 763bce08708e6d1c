"""Hyper-parameter search: every trial is an experiment of its own, and a search goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_ws.cli import main
from lora_ws.collection import AdapterSet
from lora_ws.config import dump_yaml, load_spec
from lora_ws.errors import ConfigError
from lora_ws.featurizers import StatsFlatVec
from lora_ws.learn.run import run_many
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.learn.tune import tune
from lora_ws.learn.tune_spec import TuneSpec
from lora_ws.models import MLP

optuna = pytest.importorskip("optuna")
SEARCH = {
    "fit.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "model.hidden": [[4], [8, 4]],
    "fit.batch_size": {"low": 16, "high": 32},
}


@pytest.fixture
def spec(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> TuneSpec:
    store = str(make_zoo(n=60).save(tmp_path / "store"))
    model, fit = MLP(hidden=(4,)), FitSpec(max_epochs=1)
    return TuneSpec(
        store, featurizer=StatsFlatVec(), model=model, fit=fit, seeds=1, search=SEARCH, trials=3
    )


@pytest.mark.slow
def test_trials_are_experiments_and_a_search_goes_on(spec: TuneSpec, tmp_path: Path) -> None:
    first = tune(spec, tmp_path / "out")
    assert len(first.study.trials) == 3
    drawn = {trial.params["fit.lr"] for trial in first.study.trials}
    assert len(drawn) == 3
    assert all(1e-4 <= rate <= 1e-1 for rate in drawn)
    assert isinstance(first.values["fit.batch_size"], int)
    assert first.spec.fit.lr == first.values["fit.lr"]
    assert list(first.spec.model.hidden) == first.values["model.hidden"]
    # The value of a trial is the validation measure of that experiment, run alone.
    alone = run_many(first.spec, [0])[0]
    assert first.study.best_value == pytest.approx(alone.val[spec.kind.selects])
    assert [r.timeless() for r in first.records] == [alone.timeless()]
    assert load_spec(ExperimentSpec, first.folder / "config.yaml").fit == first.spec.fit

    more = tune(replace(spec, trials=5), tmp_path / "out")
    assert [trial.number for trial in more.study.trials] == list(range(5))
    assert len({trial.params["fit.lr"] for trial in more.study.trials}) == 5
    values = [trial.value for trial in more.study.trials]
    assert more.study.best_value == np.max(values)
    # Another search is another study, and does not count these trials.
    other = tune(replace(spec, search={"model.hidden": [[4]]}, trials=1), tmp_path / "out")
    assert len(other.study.trials) == 1


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "search: expected at least one key"),
        ({"fit.lr": 0.1}, r"search\.fit\.lr: expected a list of values, or low and high"),
        ({"fit.lr": {"low": 1, "high": 0}}, r"search\.fit\.lr: expected a list of values"),
        ({"fit.lr": {"low": 0, "high": 1, "up": 1}}, r"search\.fit\.lr: expected a list of values"),
    ],
)
def test_what_is_no_search_is_refused(search: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneSpec(search=search)


@pytest.mark.slow
def test_keys_are_those_of_the_experiment(spec: TuneSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.fit\.lrr: no `lrr` in FitSpec.*`lr`"):
        tune(replace(spec, search={"fit.lrr": [0.1]}), tmp_path / "out")
    with pytest.raises(ConfigError, match="search: expected keys of model, featurizer"):
        tune(replace(spec, search={"seeds": [1]}), tmp_path / "out")


@pytest.mark.slow
def test_the_command_prints_the_best(
    spec: TuneSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump_yaml(spec, tmp_path / "tune.yaml")
    out = tmp_path / "out"
    assert main(["tune", "--config", str(tmp_path / "tune.yaml"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "The best of 3 trials, mean of 1 seeds." in said
    assert str(out / "best") in said
