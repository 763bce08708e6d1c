"""Several ranks: two processes on the CPU find what one finds, count every row once, and resume."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest
import torch
from tolerances import rounding

from lora_ws.collection import AdapterSet, Split
from lora_ws.errors import ConfigError, TrainingError
from lora_ws.featurizers import FlatVec, StatsLayer
from lora_ws.learn.callbacks import KeepBest
from lora_ws.learn.data import FeatureData
from lora_ws.learn.features import prepare, prepare_once
from lora_ws.learn.ranks import Ranks
from lora_ws.learn.run import fit_seed, run, run_many
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.memory import LIMIT
from lora_ws.models import MLP
from lora_ws.report.records import RunRecord, read_records, summarise

TWO = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
# Of 86 rows to train on the last batch has one, and one row validates: the second rank has none.
SMALL = MLP(hidden=(32,))
FIT = FitSpec(lr=3e-3, batch_size=17, max_epochs=4)
BASE = ExperimentSpec(featurizer=StatsLayer(), model=SMALL, fit=FIT, seeds=1)
LONG = replace(FIT, max_epochs=80, patience=80, batch_size=43)


@pytest.fixture
def store(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> str:
    zoo = make_zoo(n=124)
    part = pa.array(np.repeat(["train", "val", "test"], [86, 1, 37]))
    return str(replace(zoo, rows=zoo.rows.append_column("part", part)).save(tmp_path / "store"))


def flags(store: str, fit: FitSpec, *more: str) -> list[str]:
    names = ("lr", "batch_size", "max_epochs", "patience", "ema", "grad_clip")
    own = [f"--fit.{k}={getattr(fit, k)}" for k in names if getattr(fit, k) is not None]
    return ["--dataset", store, "--out", "run", "--model=MLP", "--model.hidden=[32]", *own, *more]


@contextmanager
def started(args: list[str], cwd: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, of which nothing is left behind."""
    child = subprocess.Popen(
        [sys.executable, "-m", "lora_ws", "train", *args],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        encoding="utf-8",
    )
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate(timeout=30)


def finish(child: subprocess.Popen[str]) -> str:
    said, errors = child.communicate(timeout=180)
    assert child.returncode == 0, errors
    return said


# In float32, as commands train. Adam divides a gradient by its own size, so that no bound on losses
# follows from rounding alone: this one is set between that and what a row of a rank makes that is
# counted twice, or not at all. Steps are exact in test_engines.
NEAR = 1e-4


def same_but_for_rounding(one: RunRecord, two: RunRecord) -> None:
    first, second = one.timeless(), two.timeless()
    assert first.pop("engine") == "lightning-cpu"
    assert second.pop("engine") == "lightning-cpu-ddp2"
    assert second.pop("val_loss") == pytest.approx(first.pop("val_loss"), rel=NEAR)
    for part in ("val", "test"):
        rows = {"val": one.n_val, "test": one.n_test}[part]
        assert second.pop(part) == pytest.approx(first.pop(part), abs=rounding(rows))
    assert first == second


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No (positive|negative) samples")
@pytest.mark.parametrize(
    "featurizer", [StatsLayer(), pytest.param(None, marks=pytest.mark.slow)], ids=["one", "five"]
)
def test_two_processes_find_what_one_finds(
    featurizer: StatsLayer | None, store: str, tmp_path: Path
) -> None:
    """One or five representations and two seeds in one command, which says everything once.

    The one with averaged weights and clipped gradients, the five as in the paper.
    """
    fit = replace(FIT, ema=0.9, grad_clip=0.5) if featurizer else FIT
    args = flags(store, fit, "--split", "part", "--seeds", "2", *TWO)
    args += ["--featurizer", "StatsLayer"] if featurizer else []
    with started(args, tmp_path) as child:
        said = finish(child)
    base = ExperimentSpec(store, split="part", featurizer=featurizer, model=SMALL, fit=fit)
    for spec in base.rows():
        folder = tmp_path / "run" / spec.slug
        both = read_records(folder / "records.jsonl")
        assert len((folder / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 2
        assert summarise(both, "accuracy").percent() in said
        prepared = prepare(spec)
        for record in both:
            alone = fit_seed(spec, prepared, record.seed)
            same_but_for_rounding(alone.record, record)
            curve = pd.read_csv(folder / f"seed-{record.seed}" / "metrics.csv")
            losses = [epoch["train_loss"] for epoch in alone.history]
            np.testing.assert_allclose(curve.train_loss, losses, rtol=NEAR)
            assert record.n_train % FIT.batch_size == record.n_val == 1
            assert np.sum(record.confusion) == record.n_test == 37
        assert not list(folder.rglob("*.npy")) + list(folder.rglob("*.ckpt"))
    assert said.count("Best by validation AUROC") == 1
    assert (tmp_path / "run" / "bundle" / "bundle.json").is_file()


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_same_command_resumes(store: str, tmp_path: Path) -> None:
    """Whichever rank is killed; the record is that of two nodes that were never interrupted."""
    args = flags(store, LONG, "--featurizer", "StatsLayer", "--seeds", "1")
    two = [*args, *TWO, "--trainer.checkpoint_every", "5"]
    (tmp_path / "whole").mkdir()
    (status, said, errors), other = on_two_nodes(args, tmp_path / "whole")
    assert status == 0, errors
    assert "test accuracy" in said
    assert other == (0, "", "")
    whole = read_records(tmp_path / "whole/run/StatsLayer/records.jsonl")
    seed = tmp_path / "run" / "StatsLayer" / "seed-0"
    for victim in ("child", "launcher"):
        with started(two, tmp_path) as child:
            rank = wait_for_checkpoint(child, seed)
            os.kill(rank.pid if victim == "child" else child.pid, signal.SIGKILL)
            _, errors = child.communicate(timeout=60)
            rank.wait(timeout=30)
            assert child.returncode != 0
            if victim == "child":
                (line,) = errors.strip().splitlines()
                assert re.match("lora-ws: one of the 2 processes.*run the same command", line)
        (held,) = seed.glob("*.ckpt")
        assert not (seed.parent / "records.jsonl").exists()
    mark(held)
    with started(two, tmp_path) as child:
        finish(child)
    again = read_records(seed.parent / "records.jsonl")
    assert [r.timeless() for r in again] == [r.timeless() for r in whole]
    assert len((seed.parent / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    curve = pd.read_csv(seed / "metrics.csv")
    assert curve.epoch.tolist() == list(range(LONG.max_epochs))
    assert curve.val_accuracy[0] == -1, "it began anew instead of resuming"
    expected = pd.read_csv(tmp_path / "whole/run/StatsLayer/seed-0/metrics.csv")
    pd.testing.assert_frame_equal(curve[1:], expected[1:])
    assert not list(seed.glob("*.ckpt"))


TO_THE_END, EARLY = replace(FIT, max_epochs=12), replace(FIT, max_epochs=99, lr=0.1)
MORE = [(TO_THE_END, 4), (TO_THE_END, "measure"), (EARLY, 4), (EARLY, 5)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fit", "cut"),
    [
        (TO_THE_END, 5),
        (EARLY, "measure"),
        *(pytest.param(*how, marks=pytest.mark.slow) for how in MORE),
    ],
)
def test_one_process_resumes_wherever_it_was_cut(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: FitSpec, cut: Any
) -> None:
    """Between checkpoints, after the epoch that ends training, and while it is measured."""
    fit = replace(fit, patience=4)
    trainer = TrainerSpec(accelerator="cpu", checkpoint_every=3)
    spec = ExperimentSpec(
        store, featurizer=StatsLayer(), model=SMALL, fit=fit, seeds=1, trainer=trainer
    )
    whole = run(replace(spec, trainer=TrainerSpec(accelerator="cpu")), tmp_path / "whole")
    stopped_early = whole[0].epochs < fit.max_epochs
    assert stopped_early == (fit.max_epochs == 99)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def stop_at(self: KeepBest, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == cut:
            raise KeyboardInterrupt
        note(self, trainer, module)

    note = KeepBest.on_validation_end
    with monkeypatch.context() as patch:
        if cut == "measure":
            patch.setattr("lora_ws.learn.run.predictions", stop)
        else:
            patch.setattr(KeepBest, "on_validation_end", stop_at)
        if cut == "measure" or cut < whole[0].epochs:
            with pytest.raises(KeyboardInterrupt):
                run(spec, tmp_path / "cut")
            assert len(list((tmp_path / "cut" / "seed-0").glob("*.ckpt"))) == 1
    again = run(spec, tmp_path / "cut")
    assert [r.timeless() for r in again] == [r.timeless() for r in whole]
    curves = [tmp_path / name / "seed-0" / "metrics.csv" for name in ("whole", "cut")]
    assert curves[0].read_text(encoding="utf-8") == curves[1].read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_checkpoint_of_another_experiment_does_not_count(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TrainerSpec(accelerator="cpu", checkpoint_every=1)
    spec = ExperimentSpec(
        store, featurizer=StatsLayer(), model=SMALL, fit=FIT, seeds=1, trainer=trainer
    )
    other = replace(spec, fit=replace(FIT, lr=0.1))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lora_ws.learn.run.predictions", stop)
        with pytest.raises(KeyboardInterrupt):
            run(other, tmp_path / "run")
    assert list((tmp_path / "run" / "seed-0").glob("*.ckpt"))
    assert run(spec, tmp_path / "run")[0].timeless() == run_many(spec, [0])[0].timeless()


def on_two_nodes(args: list[str], folder: Path) -> list[tuple[int, str, str]]:
    """Two tasks as srun starts them, one on each of two nodes: status, output and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "SLURM_JOB_NAME": "ddp",
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_LOCALID": "0",
        "MASTER_PORT": port,
    }
    args = [*args, "--trainer.num_nodes", "2", "--trainer.accelerator", "cpu"]
    places = [{**slurm, "SLURM_PROCID": k, "SLURM_NODEID": k} for k in "01"]
    with started(args, folder, **places[0]) as one, started(args, folder, **places[1]) as two:
        return [(c.returncode, *said) for c in (one, two) if (said := c.communicate(timeout=180))]


def wait_for_checkpoint(child: subprocess.Popen[str], seed: Path) -> psutil.Process:
    """The other rank, once there is a new checkpoint."""
    start, deadline = time.time(), time.monotonic() + 180
    while not any(file.stat().st_mtime > start for file in seed.glob("*.ckpt")):
        assert child.poll() is None, child.stderr and child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (rank,) = psutil.Process(child.pid).children()
    return rank


def mark(checkpoint: Path) -> None:
    """Let the curve of a run that goes on from here show that it did."""
    held = torch.load(checkpoint, weights_only=True)
    held["callbacks"]["KeepBest"]["history"][0]["val_accuracy"] = -1.0
    torch.save(held, checkpoint)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_every_batch_and_take_no_row_twice(world: int) -> None:
    """Of whatever rows, in the order that one process draws."""
    features, labels = torch.arange(20.0)[:, None], np.arange(20)
    split = Split(np.arange(0, 10), np.arange(10, 13), np.arange(13, 20))
    data = [FeatureData(features, labels, split, 3, 0, Ranks(k, world)) for k in range(world)]
    alone = FeatureData(features, labels, split, 3, 0)
    for _ in range(2):  # another order each epoch
        steps = [list(one.train_dataloader()) for one in data]
        assert {len(epoch) for epoch in steps} == {4 if world > 1 else 1}
        taken = [[batch for step in epoch for batch in step] for epoch in steps]
        expected = [batch for step in alone.train_dataloader() for batch in step]
        for parts, (_, whole, size) in zip(zip(*taken, strict=True), expected, strict=True):
            assert sorted(torch.cat([part[1] for part in parts])) == sorted(whole)
            assert all(part[2] == size == len(whole) for part in parts)
            assert all(torch.equal(part[0][:, 0], part[1]) for part in parts)
    for rows, part in ((split.val, "val"), (split.test, "test")):
        loaders = [getattr(one, f"{part}_dataloader")() for one in data]
        taken = [batch[1] for loader in loaders for batch in loader]
        assert sorted(torch.cat(taken)) == sorted(rows)
        assert len({len(loader) for loader in loaders}) == 1


@dataclass(frozen=True)
class Scripted(Ranks):
    """A rank of two without the other: it hears what it is given, else makes it itself."""

    heard: Any = None

    def first(self, call: Callable[[], Any]) -> Any:
        return self.heard or call()


@pytest.mark.parametrize(
    ("featurizer", "in_memory"), [(FlatVec(), 1000), (FlatVec(), 1 << 30), (StatsLayer(), 1000)]
)
def test_every_rank_maps_the_features_of_the_first(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, featurizer: Any, in_memory: int
) -> None:
    """From its file; from the store, where they are the store's own numbers."""
    monkeypatch.setenv(LIMIT, str(4 * in_memory))
    spec, file = ExperimentSpec(store, featurizer=featurizer), tmp_path / "features.npy"
    first = prepare_once(spec, Scripted(0, 2), file)
    told = {f.name: getattr(first, f.name) for f in fields(first)}
    for name in ("adapters", "featurizer", "features"):
        told.pop(name)
    other = prepare_once(spec, Scripted(1, 2, {"written": file.exists(), **told}), file)
    assert file.exists() == (in_memory > 1000 or isinstance(featurizer, StatsLayer))
    for one in (first, other):
        assert not isinstance(one.features, torch.Tensor)
        np.testing.assert_array_equal(one.features, np.asarray(prepare(spec).features))


def test_a_lost_rank_is_said_once_and_other_errors_stay_what_they_are() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    said = r"one of the 2 processes.*same command again"
    with pytest.raises(TrainingError, match=said), Ranks(0, 2).together():
        raise lost
    with pytest.raises(SystemExit), Ranks(1, 2).together():
        raise lost
    for ranks, error in ((Ranks(0, 2), RuntimeError("shapes differ")), (Ranks(), lost)):
        with pytest.raises(RuntimeError) as caught, ranks.together():
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": 0}, r"trainer\.devices: expected at least 1, got 0"),
        ({"num_nodes": 0}, r"trainer\.num_nodes: expected at least 1, got 0"),
        ({"strategy": "ddp"}, r"trainer\.strategy: expected several devices.*set trainer\.devices"),
        ({"checkpoint_every": -1}, r"trainer\.checkpoint_every: expected 0 or more, got -1"),
    ],
)
def test_impossible_trainers_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerSpec(**values)


def test_several_devices_mean_ddp_and_checkpoints() -> None:
    assert TrainerSpec().epochs_to_checkpoint == 0
    assert TrainerSpec(devices=2).epochs_to_checkpoint == 10
    assert TrainerSpec(devices=8, num_nodes=2, checkpoint_every=0).epochs_to_checkpoint == 0
    assert TrainerSpec(devices=8, num_nodes=2).world == 16


def test_records_without_a_folder_need_one_process(store: str) -> None:
    spec = ExperimentSpec(store, featurizer=StatsLayer(), trainer=TrainerSpec(devices=2))
    with pytest.raises(ConfigError, match=r"expected 1 without a folder, got 2; use run\(spec"):
        run_many(spec, [0])


@pytest.mark.slow
def test_an_error_of_the_first_rank_is_said_once(store: str, tmp_path: Path) -> None:
    args = flags(store, FIT, "--featurizer", "StatsLayer", "--label", "colour")
    (status, _, errors), other = on_two_nodes(args, tmp_path)
    assert status == 2
    assert errors.count("lora-ws: ") == 1
    assert "colour" in errors
    assert other == (0, "", "")
