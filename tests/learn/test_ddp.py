"""Several ranks: two processes on the CPU find what one finds, count every row once, and resume."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from lora_ws.cli import main
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.featurizers import FlatVec, StatsLayer
from lora_ws.learn.data import FeatureData
from lora_ws.learn.features import prepare
from lora_ws.learn.ranks import Ranks
from lora_ws.learn.run import run, run_many
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.report.records import METRICS, RunRecord, read_records

TWO = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
# 87 rows train: the last batch has one row, which leaves the second rank without any.
FIT = FitSpec(hidden=(32,), lr=3e-3, batch_size=43, max_epochs=4)
LONG = replace(FIT, max_epochs=400, patience=400, batch_size=29)


@pytest.fixture
def store(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> str:
    return str(make_zoo(n=123).save(tmp_path / "store"))


def flags(store: str, fit: FitSpec, *more: str) -> list[str]:
    own = [f"--fit.{k}={getattr(fit, k)}" for k in ("lr", "batch_size", "max_epochs", "patience")]
    return ["--dataset", store, "--out", "run", "--fit.hidden=[32]", *own, *more]


@contextmanager
def started(args: list[str], cwd: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, of which nothing is left behind."""
    child = subprocess.Popen(
        [sys.executable, "-m", "lora_ws", "train", *args],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.communicate(timeout=30)


def finish(child: subprocess.Popen[str]) -> str:
    said, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return said


def same_but_for_rounding(one: RunRecord, two: RunRecord) -> None:
    first, second = one.timeless(), two.timeless()
    assert first.pop("engine") == "lightning-cpu"
    assert second.pop("engine") == "lightning-cpu-ddp2"
    assert second.pop("val_loss") == pytest.approx(first.pop("val_loss"), rel=1e-4)
    for part in ("val", "test"):
        assert second.pop(part) == pytest.approx(first.pop(part), abs=1e-6)
    assert first == second


def test_two_processes_find_what_one_finds(store: str, tmp_path: Path) -> None:
    """Five representations and two seeds in one command, which says everything once."""
    with started(flags(store, FIT, "--seeds", "2", *TWO), tmp_path) as child:
        said = finish(child)
    for spec in ExperimentSpec(store, fit=FIT, seeds=2).rows():
        alone = run(spec, tmp_path / "alone" / spec.slug)
        folder = tmp_path / "run" / spec.slug
        both = read_records(folder / "records.jsonl")
        assert len((folder / "records.jsonl").read_text().splitlines()) == 2
        assert np.sum(both[0].confusion) == both[0].n_test == 24
        assert both[0].n_train % FIT.batch_size == 1
        for one, two in zip(alone, both, strict=True):
            same_but_for_rounding(one, two)
        curves = [pd.read_csv(d / "seed-0" / "metrics.csv") for d in (tmp_path / "alone" / spec.slug, folder)]
        np.testing.assert_allclose(curves[0].train_loss, curves[1].train_loss, rtol=1e-4)
        assert said.count(f"{spec.name}: test accuracy") == 1
        assert not list(folder.rglob("*.npy")) + list(folder.rglob("*.ckpt"))
    assert said.count("Best by validation AUROC") == 1
    assert (tmp_path / "run" / "bundle" / "bundle.json").is_file()
