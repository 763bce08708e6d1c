"""Classifiers trained together come out as they do alone, resume, and name who fails."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from reference_loop import train_alone
from scipy.stats import ttest_ind
from tolerances import EXACT, rounding, terms_of
from torch.nn import functional as F

from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError, TrainingError
from lora_ws.featurizers import FlatVec, StatsFlatVec, StatsLayer
from lora_ws.learn.batched import fit_batched, models_that_fit
from lora_ws.learn.data import FeatureData
from lora_ws.learn.engine import engine_of
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.metrics import class_metrics
from lora_ws.learn.module import LoraModule
from lora_ws.learn.optim import ManyAdam, PlateauAndStop
from lora_ws.learn.result import Fitted, Job
from lora_ws.learn.run import fit_seed, run, run_many
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.stacked import StackedTrainer
from lora_ws.memory import LIMIT
from lora_ws.models import MLP
from lora_ws.report.records import read_records

FAST, SMALL = FitSpec(lr=3e-3, max_epochs=12, patience=4), MLP(hidden=(32,))
BATCHED = TrainerSpec(accelerator="cpu", engine="batched")


@pytest.fixture
def spec(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> ExperimentSpec:
    store = str(make_zoo().save(tmp_path / "store"))
    return ExperimentSpec(
        store, featurizer=StatsLayer(), model=SMALL, fit=FAST, trainer=BATCHED, seeds=3
    )


def jobs_of(spec: ExperimentSpec, prepared: Prepared, seeds: range = range(3)) -> list[Job]:
    return [Job(spec, prepared, seed) for seed in seeds]


def columns(prepared: Prepared, part: slice, dtype: type = np.float32) -> Prepared:
    """An experiment on some of the features."""
    few = prepared.columns(part)
    return replace(few, features=torch.from_numpy(np.asarray(few.features, dtype)))


def losses_of(fitted: Fitted) -> list[float]:
    return [entry["val_loss"] for entry in fitted.history]


def test_in_float64_equal_to_one_by_one(spec: ExperimentSpec) -> None:
    """Two experiments of other features; models that stop at other epochs, at falling rates."""
    fit = FitSpec(lr=0.02, max_epochs=60, patience=6, lr_patience=1)
    spec, prepared = replace(spec, model=MLP(hidden=(16, 12)), fit=fit), prepare(spec)
    first, second = (columns(prepared, part, float) for part in (np.s_[:14], np.s_[14:28]))
    jobs = jobs_of(spec, first, range(4)) + jobs_of(spec, second, range(2, 5))
    together = fit_batched(jobs)
    assert len({fitted.record.epochs for fitted in together}) >= 4
    for job, fitted in zip(jobs, together, strict=True):
        losses, _, best = train_alone(job)
        assert fitted.record.epochs == len(losses)
        assert fitted.record.best_epoch == 1 + int(np.argmin(losses))
        np.testing.assert_allclose(losses_of(fitted), losses, rtol=EXACT, atol=EXACT)
        found = fitted.network.state_dict()
        for name, value in best.items():
            torch.testing.assert_close(found[name], value, rtol=EXACT, atol=EXACT)


def test_adam_is_torchs() -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 1, 5, dtype=torch.float64)]
    rates = [0.1, 0.01, 1e-4]
    stacked = [value.clone() for value in start]
    single = [[value[k].clone() for value in start] for k in range(3)]
    ours = ManyAdam(stacked)
    theirs = [torch.optim.Adam(v, lr) for v, lr in zip(single, rates, strict=True)]
    for _ in range(20):
        # Small gradients, where the constant in the denominator counts.
        gradients = [1e-7 * torch.randn_like(value) for value in start]
        ours.step(gradients, torch.tensor(rates, dtype=torch.float64))
        for k, optimizer in enumerate(theirs):
            for value, gradient in zip(single[k], gradients, strict=True):
                value.grad = gradient[k]
            optimizer.step()
    for k in range(3):
        torch.testing.assert_close([v[k] for v in stacked], single[k], rtol=EXACT, atol=EXACT)


def test_patience_is_torchs_and_lightnings() -> None:
    fit = FitSpec(lr=0.1, patience=4, lr_patience=1)
    random = np.random.default_rng(0)
    # Steps on both sides of the plateau's threshold of a ten thousandth, ties, and a NaN.
    losses = 1 + np.cumsum(random.choice([-2e-4, -5e-5, 0, 1e-4], (40, 30)), 0)
    losses[2, 3] = np.nan
    ours, running = PlateauAndStop(30, fit), torch.arange(30)
    stopped, rates = {}, {}
    for epoch, row in enumerate(losses):
        _, done = ours.step(torch.from_numpy(row)[running])
        rates |= dict(zip(running.tolist(), ours.lr.tolist(), strict=True))
        stopped |= dict.fromkeys(running[done].tolist(), epoch)
        ours.keep((~done).nonzero()[:, 0])
        running = running[~done]
    for k in range(30):
        optimizer = torch.optim.Adam([torch.zeros(1)], fit.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=fit.lr_factor, patience=fit.lr_patience
        )
        stop = EarlyStopping("val_loss", patience=fit.patience)
        last = len(losses) - 1
        for epoch, loss in enumerate(losses[:, k]):
            schedule.step(loss)
            if stop._evaluate_stopping_criteria(torch.tensor(loss))[0]:
                last = epoch
                break
        assert stopped.get(k, len(losses) - 1) == last
        assert rates[k] == optimizer.param_groups[0]["lr"]
    assert len(set(stopped.values())) > 3
    assert stopped[3] == 2
    assert len(set(rates.values())) > 3


@pytest.mark.slow
def test_in_float32_seeds_are_distributed_alike(spec: ExperimentSpec) -> None:
    spec = replace(spec, fit=replace(FAST, lr=1e-3, max_epochs=6))
    together = run_many(spec, range(12))
    one_by_one = run_many(replace(spec, trainer=TrainerSpec("cpu", engine="one-by-one")), range(12))
    less = run_many(replace(spec, fit=replace(spec.fit, lr=5e-4)), range(12))
    for measure in (lambda r: r.test["accuracy"], lambda r: r.val_loss):
        values = [list(map(measure, records)) for records in (together, one_by_one, less)]
        assert np.std(values[0]) > 0
        assert ttest_ind(values[0], values[1]).pvalue > 0.05
        assert ttest_ind(values[0], values[2]).pvalue < 0.01  # the test can tell what differs
    assert {record.engine for record in together} == {"batched-cpu"}
    assert {record.engine for record in one_by_one} == {"lightning-cpu"}


def test_record_is_of_the_classifier_returned(spec: ExperimentSpec) -> None:
    prepared = prepare(spec)
    fitted = fit_batched(jobs_of(spec, prepared))[1]
    alike = fit_seed(spec, prepared, 1).record
    assert set(fitted.record.timeless()) == set(alike.timeless())
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    data = FeatureData(prepared.features, prepared.labels, prepared.split, 16, 0)
    module = LoraModule(fitted.network, prepared.task, spec.fit)
    trainer.test(module, data.test_dataloader(), verbose=False)
    values = class_metrics(len(prepared.task.classes))
    values.update(*module.tested)
    values = values.compute()
    bound = rounding(len(prepared.split.test))
    assert fitted.record.test["auroc"] == pytest.approx(float(values["auroc"]), abs=bound)
    assert fitted.record.confusion == tuple(map(tuple, values["confusion"].long().tolist()))
    scores = fitted.network(prepared.features[prepared.split.val]).detach()
    loss = F.cross_entropy(scores, torch.from_numpy(prepared.labels)[prepared.split.val])
    bound = rounding(terms_of(fitted.network), size=float(scores.abs().max()))
    assert fitted.record.val_loss == pytest.approx(float(loss), abs=bound)


def test_jobs_of_other_classes_rows_and_features_go_in_one_call(
    spec: ExperimentSpec, make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    store = str(make_zoo(n=90, classes=3, seed=1).save(tmp_path / "other"))
    other = replace(spec, dataset=store)
    flat = replace(spec, featurizer=StatsFlatVec())
    groups = [jobs_of(s, prepare(s), range(2)) for s in (spec, other, flat)]
    mixed = [job for same in zip(*groups, strict=True) for job in same]
    found = [fitted.record.timeless() for fitted in fit_batched(mixed)]
    expected = [[fitted.record.timeless() for fitted in fit_batched(jobs)] for jobs in groups]
    assert found == [record for same in zip(*expected, strict=True) for record in same]
    assert [(len(r["classes"]), r["n_train"]) for r in found[:2]] == [(4, 84), (3, 63)]


def test_memory_bounds_the_stacks(spec: ExperimentSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(spec)
    jobs, sizes = jobs_of(spec, prepared, range(5)), []
    epoch = StackedTrainer._run_epoch
    monkeypatch.setattr(
        StackedTrainer, "_run_epoch", lambda self: (sizes.append(len(self.histories)), epoch(self))
    )
    weights = 896 * 32 + 32 + 32 * 4 + 4
    two = 2 * 7 * 4 * weights / 2**30
    assert models_that_fit(jobs[0], 1.001 * two) == 2
    assert models_that_fit(jobs[0], 1e-9) == 1
    records = [fitted.record for fitted in fit_batched(jobs, memory_gb=1.001 * two)]
    assert sizes[0] == 2
    assert sizes[-1] == 1
    assert [record.seed for record in records] == list(range(5))
    with pytest.raises(ConfigError, match="expected memory_gb and every above 0"):
        fit_batched(jobs, memory_gb=0)


def cut_off(monkeypatch: pytest.MonkeyPatch, epochs: int) -> list[int]:
    """Let training be interrupted once, after some epochs; returns the list of those run."""
    run_epoch, ran = StackedTrainer._run_epoch, []

    def counted(self: StackedTrainer) -> None:
        if len(ran) == epochs:
            ran.append(0)
            raise KeyboardInterrupt
        run_epoch(self)
        ran.append(self.epoch)

    monkeypatch.setattr(StackedTrainer, "_run_epoch", counted)
    return ran


def test_cut_off_training_resumes_to_the_same(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = FitSpec(lr=0.02, max_epochs=30, patience=3)
    spec = replace(spec, model=MLP(hidden=(16,)), fit=fit)
    jobs = jobs_of(spec, prepare(spec), range(4))
    weights = 896 * 16 + 16 + 16 * 4 + 4
    how = {"memory_gb": 2.001 * 7 * 4 * weights / 2**30, "every": 2}  # two stacks of two
    whole = fit_batched(jobs, **how)
    first = max(fitted.record.epochs for fitted in whole[:2])
    second = max(fitted.record.epochs for fitted in whole[2:])
    assert len({fitted.record.epochs for fitted in whole[2:]}) == 2
    cut = min(fitted.record.epochs for fitted in whole[2:])  # when one of two has left the stack
    ran = cut_off(monkeypatch, first + cut)
    with pytest.raises(KeyboardInterrupt):
        fit_batched(jobs, checkpoint=tmp_path / "state", **how)
    again = fit_batched(jobs, checkpoint=tmp_path / "state", **how)
    assert ran[first + cut + 1 :] == list(range(cut - cut % 2 + 1, second + 1))
    for one, other in zip(whole, again, strict=True):
        assert one.record.timeless() == other.record.timeless()
        assert one.history == other.history
        states = one.network.state_dict(), other.network.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_state_of_other_jobs_is_not_taken(spec: ExperimentSpec, tmp_path: Path) -> None:
    prepared = prepare(spec)
    small = columns(prepared, np.s_[:7])
    for jobs in (
        jobs_of(spec, small),
        jobs_of(spec, columns(prepared, np.s_[7:14])),
        jobs_of(spec, small, range(1, 4)),
        jobs_of(replace(spec, fit=replace(FAST, lr=0.01)), small),
    ):
        kept = fit_batched(jobs, checkpoint=tmp_path)
        assert [f.history for f in kept] == [f.history for f in fit_batched(jobs)]
    assert len(list(tmp_path.glob("*.pt"))) == 4
    assert not list(tmp_path.glob("*.half"))


@pytest.mark.slow
def test_run_folder_is_that_of_one_by_one(spec: ExperimentSpec, tmp_path: Path) -> None:
    records = run(spec, tmp_path / "together")
    run(replace(spec, trainer=TrainerSpec("cpu")), tmp_path / "alone")
    names = [
        {str(file.relative_to(tmp_path / kind)) for file in (tmp_path / kind).rglob("*")}
        for kind in ("together", "alone")
    ]
    assert names[0] == names[1]
    for record in records:
        file = f"seed-{record.seed}/metrics.csv"
        curve, other = (pd.read_csv(tmp_path / kind / file) for kind in ("together", "alone"))
        assert set(curve.columns) == set(other.columns)
        assert len(curve) == record.epochs
        assert curve["val_loss"].idxmin() + 1 == record.best_epoch


@pytest.mark.slow
def test_run_resumes_and_holds_one_engine(spec: ExperimentSpec, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(replace(spec, seeds=1), out)
    records = run(spec, out)
    assert records[0] == first[0]  # the times too: it was read, not run
    assert records == read_records(out / "records.jsonl")
    with pytest.raises(ConfigError, match="another engine"):
        run(replace(spec, seeds=4, trainer=TrainerSpec("cpu")), out)


@pytest.mark.slow
def test_cut_off_run_goes_on_from_its_state(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = replace(FAST, max_epochs=130, patience=130)
    spec = replace(spec, model=MLP(hidden=(8,)), fit=fit)
    whole = [record.timeless() for record in run(spec, tmp_path / "whole")]
    ran = cut_off(monkeypatch, 120)
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "run")
    assert (tmp_path / "run" / ".state").is_dir()
    assert [record.timeless() for record in run(spec, tmp_path / "run")] == whole
    assert ran[121] == 101
    assert not (tmp_path / "run" / ".state").exists()


def test_the_seed_that_diverges_is_named(spec: ExperimentSpec, tmp_path: Path) -> None:
    prepared = prepare(spec)
    broken = replace(prepared, features=prepared.features * torch.nan)
    jobs = [Job(spec, prepared, 5), Job(spec, broken, 7), Job(spec, prepared, 9)]
    with pytest.raises(TrainingError, match=r"StatsLayer, seed 7: .* lower fit\.lr"):
        fit_batched(jobs, checkpoint=tmp_path)


def test_mapped_features_give_the_same(
    spec: ExperimentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = replace(FAST, max_epochs=3)
    flat = replace(spec, featurizer=FlatVec(), model=MLP(hidden=(8,)), fit=fit)
    small = [record.timeless() for record in run_many(flat, range(2))]
    monkeypatch.setattr("lora_ws.learn.features.BLOCK_BYTES", 1000)
    for limit in (1 << 30, 16_000):
        monkeypatch.setenv(LIMIT, str(limit))
        assert isinstance(prepare(flat).features, np.ndarray)
        assert [record.timeless() for record in run_many(flat, range(2))] == small


def test_auto_takes_the_engine_of_the_device_and_says_so_once(
    spec: ExperimentSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lora_ws")
    run_many(replace(spec, trainer=TrainerSpec()), range(2))
    chosen = "batched, on CUDA" if torch.cuda.is_available() else "one-by-one, not on CUDA"
    assert [r.getMessage() for r in caplog.records if r.name == "lora_ws"] == [
        f"engine: {chosen} (trainer.engine: auto)"
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_of(ExperimentSpec(trainer=TrainerSpec())) == "batched"
    assert engine_of(ExperimentSpec(trainer=TrainerSpec(accelerator="cpu"))) == "one-by-one"
    assert engine_of(ExperimentSpec(trainer=TrainerSpec(loggers=("WandbLogger",)))) == "one-by-one"
    assert engine_of(ExperimentSpec(trainer=TrainerSpec(engine="one-by-one"))) == "one-by-one"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine_of(ExperimentSpec(trainer=TrainerSpec())) == "one-by-one"
    with pytest.raises(ConfigError, match=r"trainer\.accelerator: expected a GPU"):
        engine_of(ExperimentSpec(trainer=TrainerSpec(accelerator="gpu")))
    with pytest.raises(ConfigError, match=r"trainer\.engine: expected a CUDA device"):
        engine_of(ExperimentSpec(trainer=TrainerSpec(engine="batched")))
    assert engine_of(ExperimentSpec(trainer=BATCHED)) == "batched"


def test_batched_with_loggers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.engine: expected auto or one-by-one"):
        TrainerSpec(engine="batched", loggers=("WandbLogger",))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_the_cpu(spec: ExperimentSpec) -> None:
    there = run_many(replace(spec, trainer=TrainerSpec("gpu")), range(12))
    here = run_many(spec, range(12))
    assert {record.engine for record in there} == {"batched-cuda"}
    values = [[record.val_loss for record in records] for records in (there, here)]
    assert ttest_ind(*values).pvalue > 0.05
