"""Calibration of a finished seed: temperature, conformal sets, and when to abstain.

All of it is fitted on the validation rows, which also chose the epoch: that makes temperature and
conformal sets slightly optimistic, as the record of the test rows in `Calibration.test` shows. For
a network that reads features abstention looks at these alone, and is therefore unaffected by the
choice of the epoch; for one that reads factors it looks at the network's embedding. Where
validation rows are trained on too, it is fitted on out-of-fold outputs (`lora_ws.learn.refit`).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from lora_ws.bundle.confidence import (
    ROWS_AT_ONCE,
    Calibration,
    Confidence,
    NetworkOutputs,
    measures,
    reads_by,
    yes_no,
)
from lora_ws.bundle.heads import Head
from lora_ws.functional.calibrate import (
    Reliability,
    conformal_threshold,
    expected_calibration_error,
    fit_temperature,
    sigmoid,
    softmax,
    threshold_at,
)
from lora_ws.functional.standardize import column_moments, safe_scale
from lora_ws.learn.data import held
from lora_ws.learn.features import Prepared
from lora_ws.models import MetanetModule

RATE, ALPHA = 0.05, 0.1
# How much further than every known row features may be from their usual size.
SLACK = 1.25
# Keeps rows that are all alike from making every other one strange.
SMALLEST_GAP = 1e-3


class Reliabilities(NamedTuple):
    """A fitted confidence, and how reliable probabilities of test rows are without and with it."""

    confidence: Confidence
    before: Reliability
    after: Reliability


class HeldOut(NamedTuple):
    """What networks make of rows that they were not fitted on.

    Attributes:
        outputs: of each row.
        labels: of each row.
    """

    outputs: NetworkOutputs
    labels: np.ndarray


def fit_confidence(
    prepared: Prepared, network: MetanetModule, out_of_fold: HeldOut | None = None
) -> Reliabilities:
    """Fit temperature, abstention and conformal sets on rows that were not trained on.

    With few validation rows the rate of abstention is the lowest that they can promise: one in as
    many as there are, plus one.

    Args:
        prepared: the data that the seed saw, with classes; of several tasks, the first has them.
        network: of the seed, on the CPU.
        out_of_fold: what to fit on; None takes the validation rows.
    """
    if prepared.task.heads:
        first = prepared.task.heads[0]
        prepared = replace(prepared, task=first.task, labels=first.own(prepared.labels))
    bare = class_directions(prepared, network)
    val = prepared.split.val
    outputs, labels = out_of_fold or run_rows(bare, prepared, network, val)
    rate = max(RATE, 1 / (len(labels) + 1))
    usual, log_norm = float(np.median(outputs.alignment)), float(np.median(outputs.log_norm))
    temperature = _temperature(outputs.logits, labels)
    logits, truth = _decisions(outputs.logits, labels)
    probabilities = softmax(logits / temperature)
    # A set is to hold what is true: of labels, those that apply.
    true = truth > 0 if labels.ndim == 2 else np.ones(len(truth), bool)
    conformal = conformal_threshold(probabilities[true], truth[true], ALPHA) if true.any() else 1.0
    thresholds = prepared.task.thresholds(sigmoid(outputs.logits / temperature), labels)
    spread = max(SLACK * float(np.abs(outputs.log_norm - log_norm).max()), SMALLEST_GAP)
    trained = run_rows(bare, prepared, network, prepared.split.train).outputs
    held = Calibration(
        rows=len(labels),
        temperature=temperature,
        abstention_rate=rate,
        median_alignment=usual,
        min_alignment=min(-threshold_at(-outputs.alignment, rate), usual - SMALLEST_GAP),
        log_norm=log_norm,
        spread=spread,
        train_norm=_train_norm(trained, log_norm, spread, rate),
        alpha=ALPHA,
        conformal=conformal,
        out_of_fold=out_of_fold is not None,
    )
    fitted = replace(bare, calibration=held, thresholds=thresholds)
    return _tested(fitted, prepared, network)


def fit_heads(prepared: Prepared, network: MetanetModule) -> tuple[Head, ...]:
    """Calibrate the tasks behind the first, on the validation rows of a finished seed.

    Args:
        prepared: the data that the seed saw.
        network: of the seed, on the CPU.
    """
    if not prepared.task.heads:
        return ()
    rows, found = prepared.split.val, []
    with torch.inference_mode():
        outputs = network(torch.as_tensor(prepared.features[rows])).numpy().astype(np.float64)
    for head in prepared.task.heads[1:]:
        name, task = head.name, head.task
        if task.target == "number":
            known: Any = task
            found.append(Head(name, mean=known.mean_, std=known.std_))
            continue
        labels, logits = head.own(prepared.labels[rows]), outputs[:, head.outputs]
        temperature = _temperature(logits, labels)
        thresholds = task.thresholds(sigmoid(logits / temperature), labels)
        found.append(Head(name, task.classes, temperature, thresholds))
    return tuple(found)


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What logits are to be divided by."""
    # Targets not quite 1 keep few rows, all classified correctly, from promising certainty.
    return fit_temperature(*_decisions(logits, labels), smoothing=1 / (len(labels) + 1))


def _train_norm(
    trained: NetworkOutputs, log_norm: float, spread: float, rate: float
) -> tuple[float, float] | None:
    """See `Calibration.train_norm`."""
    excess = trained.log_norm - log_norm
    beyond = excess > spread
    if not beyond.any():
        return None
    aligned = float(np.quantile(trained.alignment[beyond], rate))
    return SLACK * float(excess.max()), aligned


def _tested(confidence: Confidence, prepared: Prepared, network: MetanetModule) -> Reliabilities:
    """With what it does on the test rows."""
    held = confidence.calibration
    assert held is not None
    outputs, labels = run_rows(confidence, prepared, network, prepared.split.test)
    found = confidence.predict(outputs)
    logits, truth = _decisions(outputs.logits, labels)
    before = expected_calibration_error(softmax(logits), truth)
    after = expected_calibration_error(softmax(logits / held.temperature), truth)
    test = {"ece_raw": before.error, **measures(found, labels, confidence.thresholds)}
    return Reliabilities(replace(confidence, calibration=replace(held, test=test)), before, after)


def _decisions(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[decisions, classes]`` and right answers: one decision a row, or one a label."""
    return yes_no(logits, labels) if labels.ndim == 2 else (logits, labels)


def run_rows(
    confidence: Confidence, prepared: Prepared, network: MetanetModule, rows: np.ndarray
) -> HeldOut:
    """Outputs of a network for some rows, and their labels."""
    parts, reads = [], reads_by(network)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = np.asarray(prepared.features[rows[start : start + ROWS_AT_ONCE]])
        parts.append(confidence.run(reads, block))
    whole = NetworkOutputs.join(parts)
    # Outputs of further tasks lie behind these.
    own = whole._replace(logits=whole.logits[:, : prepared.task.outputs])
    return HeldOut(own, prepared.labels[rows])


def class_directions(prepared: Prepared, network: MetanetModule) -> Confidence:
    """Where the classes lie among the embedded training rows; no direction for an empty class."""
    embeddings, train = _embed(prepared, network)
    members = prepared.task.members(prepared.labels[prepared.split.train])
    mean, std = column_moments(embeddings, rows=train)
    centre, scale = mean.astype(np.float32), safe_scale(std.astype(np.float32))
    found = np.zeros((prepared.task.outputs, embeddings.shape[1]))
    for label in np.flatnonzero(members.any(axis=0)):
        rows = train[members[:, label]]
        found[label] = (column_moments(embeddings, rows=rows)[0] - centre) / scale
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    directions = found / np.where(norms > 0, norms, 1)
    return Confidence(centre, scale, directions.astype(np.float32))


@torch.inference_mode()
def _embed(prepared: Prepared, network: MetanetModule) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings, and which of them are the training rows; features that embed as themselves stay.

    Returns:
        ``[rows, width]`` and row numbers ``[training rows]``.
    """
    train = prepared.split.train
    first = held(prepared.features[:1])
    if network.embed(first) is first:
        return np.asarray(prepared.features), train
    blocks = [train[start : start + ROWS_AT_ONCE] for start in range(0, len(train), ROWS_AT_ONCE)]
    parts = [network.embed(torch.as_tensor(prepared.features[block])).numpy() for block in blocks]
    return np.concatenate(parts), np.arange(len(train))
