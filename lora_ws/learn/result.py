"""What a finished seed is, whichever engine trained it."""

import math
from typing import NamedTuple

from lora_ws.errors import TrainingError
from lora_ws.learn.calibration import HeldOut
from lora_ws.learn.features import Prepared
from lora_ws.learn.metrics import Measured
from lora_ws.learn.spec import ExperimentSpec, describe
from lora_ws.models import MLP, MetanetModule
from lora_ws.report.records import RunRecord

History = list[dict[str, float]]


class Job(NamedTuple):
    """One network to train: an experiment, its data as the seed sees them, and the seed."""

    spec: ExperimentSpec
    prepared: Prepared
    seed: int


class Fitted(NamedTuple):
    """A finished job: record, network on the CPU, curves by epoch, predictions of test rows.

    Where validation rows were trained on too, ``out_of_fold`` is what to calibrate on.
    """

    job: Job
    record: RunRecord
    network: MetanetModule
    history: History
    test: Measured
    out_of_fold: HeldOut | None = None


def diverged(name: str) -> TrainingError:
    """The error of a model that no epoch fitted; the name says experiment and seed."""
    return TrainingError(f"{name}: the validation loss was never finite; lower fit.lr")


def best_of(history: History) -> dict[str, float]:
    """The epoch with the lowest validation loss, the first of equals."""
    finite = [epoch for epoch in history if math.isfinite(epoch["val_loss"])]
    return min(finite, key=lambda epoch: epoch["val_loss"])


def make_record(
    job: Job,
    history: History,
    val: Measured,
    test: Measured,
    *,
    engine: str,
    seconds: float,
) -> RunRecord:
    """The record of a job.

    Args:
        job: what was trained.
        history: losses and accuracy by epoch, with at least one finite loss.
        val: metrics of the best epoch on the validation rows.
        test: and on the test rows.
        engine: what trained it.
        seconds: how long it took.
    """
    spec, prepared, seed = job
    best = best_of(history)
    return RunRecord(
        name=spec.name,
        representation="metadata" if spec.metadata else type(spec.featurizer).__name__,
        dataset=prepared.adapters.card.name,
        subset=prepared.subset,
        data_version=prepared.adapters.version,
        layout=prepared.adapters.layout.fingerprint,
        protocol=spec.protocol,
        engine=engine,
        seed=seed,
        dim=prepared.features.shape[1],
        classes=prepared.task.classes,
        n_train=len(prepared.split.train),
        n_val=len(prepared.split.val),
        n_test=len(prepared.split.test),
        epochs=len(history),
        best_epoch=int(best["epoch"]),
        val_loss=best["val_loss"],
        val=val.values,
        test=test.values,
        confusion=test.confusion,
        seconds=seconds,
        feature_seconds=prepared.seconds,
        split=spec.split or "",
        task=prepared.task.name,
        model="MLP" if isinstance(spec.model, MLP) else describe(spec.model),
    )
