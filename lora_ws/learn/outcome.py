"""What a finished seed is, whichever engine trained it."""

import math
from typing import NamedTuple

from torchmetrics import MetricCollection

from lora_ws.errors import TrainingError
from lora_ws.learn.classifier import LoraClassifier
from lora_ws.learn.features import Prepared
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.report.records import METRICS, RunRecord

PROTOCOL = "clean"
History = list[dict[str, float]]
Confusion = tuple[tuple[int, ...], ...]


class Fitted(NamedTuple):
    """A finished seed: its record, its classifier, and its curves by epoch."""

    record: RunRecord
    classifier: LoraClassifier
    history: History


class Measured(NamedTuple):
    """The metrics of a classifier on some rows, and which class was taken for which."""

    values: dict[str, float]
    confusion: Confusion


def computed(metrics: MetricCollection) -> Measured:
    """What metrics say of the predictions they were given."""
    values = metrics.compute()
    confusion = tuple(tuple(row) for row in values["confusion"].long().tolist())
    return Measured({name: float(values[name]) for name in METRICS}, confusion)


def diverged(name: str) -> TrainingError:
    """The error of a model that no epoch fitted; the name says experiment and seed."""
    return TrainingError(f"{name}: the validation loss was never finite; lower fit.lr")


def best_of(history: History) -> dict[str, float]:
    """The epoch with the lowest validation loss, the first of equals."""
    finite = [epoch for epoch in history if math.isfinite(epoch["val_loss"])]
    return min(finite, key=lambda epoch: epoch["val_loss"])


def make_record(
    spec: ExperimentSpec,
    prepared: Prepared,
    seed: int,
    history: History,
    val: Measured,
    test: Measured,
    *,
    engine: str,
    seconds: float,
) -> RunRecord:
    """The record of a seed.

    Args:
        spec: the experiment.
        prepared: its data.
        seed: which seed.
        history: losses and accuracy by epoch, with at least one finite loss.
        val: metrics of the best epoch on the validation rows.
        test: and on the test rows.
        engine: what trained it.
        seconds: how long it took.
    """
    best = best_of(history)
    return RunRecord(
        name=spec.name,
        representation=type(spec.featurizer).__name__,
        dataset=prepared.zoo.card.name,
        subset=prepared.subset,
        data_version=prepared.zoo.version,
        layout=prepared.zoo.layout.fingerprint,
        protocol=PROTOCOL,
        engine=engine,
        seed=seed,
        dim=prepared.features.shape[1],
        classes=prepared.classes,
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
    )
