"""What a classifier may be believed: calibrated probabilities, and when to abstain.

`fit_confidence` fits it on the validation rows, which also chose the epoch: that makes temperature
and conformal sets slightly optimistic, as the record of the test rows in `Calibration.test` shows.
Abstention looks at features alone and not at the network, so the choice of the epoch is nothing to
it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import softmax
from torch import nn

from lora_ws.functional.calibrate import (
    Reliability,
    conformal_sets,
    conformal_threshold,
    expected_calibration_error,
    fit_temperature,
    threshold_at,
)
from lora_ws.functional.standardize import column_moments
from lora_ws.learn.features import Prepared
from lora_ws.learn.module import LoraModule

RATE, ALPHA = 0.05, 0.1
# How much further than every known row features may be from their usual size.
SLACK = 1.25
# Keeps rows that are all alike from making every other one strange.
SMALLEST_GAP = 1e-3
ROWS_AT_ONCE = 256
ABSTENTIONS = {
    "uncalibrated": "the bundle holds no calibration; train it again with this version",
    "projected": "the weights were projected, and the bundle reads numbers that this changes",
    "not-finite": "the weights or what is made of them hold NaN or infinite values",
    "out-of-range": "its features are much smaller or larger than those of known adapters",
    "unfamiliar": "it resembles none of the classes",
}


@dataclass(frozen=True)
class Verdict:
    """What a bundle says of one adapter.

    Attributes:
        label: the class; None where the bundle abstains.
        confidence: calibrated probability of the likeliest class, given that it is one of them.
        probabilities: of all classes, the likeliest first.
        score: how strange the adapter is: 0 for the usual one, above 1 the bundle abstains; None
            where it cannot tell.
        reason: why it abstains, a key of `ABSTENTIONS`; empty where it does not.
        conformal_set: classes among which the true one of a known adapter is in the share of cases
            that the calibration states; all of them where the bundle is not calibrated.
    """

    label: str | None
    confidence: float
    probabilities: dict[str, float]
    score: float | None
    reason: str
    conformal_set: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """The numbers fitted on validation rows, and what they do on the test rows.

    Attributes:
        rows: how many validation rows.
        temperature: what logits are divided by.
        rate: share of known adapters that may be taken for unfamiliar.
        usual: alignment of the median validation row, see `Seen.alignment`.
        least: the lowest alignment that is answered.
        log_norm: median logarithm of the norm of standardised features.
        spread: how far from it an answered one may be.
        alpha: share of known adapters whose conformal set may lack the true class.
        conformal: threshold of conformal sets.
        met: None, or, where training rows are further above it than that (a kernel has met them),
            how far above an answered one may be that is at least as aligned as these, and the
            least alignment of these.
        test: on the test rows, ``ece_raw`` and ``ece`` (expected calibration error before and after
            the temperature), ``abstained``, ``accuracy_answered`` (None without any), ``coverage``
            and mean ``set_size`` of the conformal sets.
    """

    rows: int
    temperature: float
    rate: float
    usual: float
    least: float
    log_norm: float
    spread: float
    alpha: float
    conformal: float
    met: tuple[float, float] | None = None
    test: dict[str, float | None] = field(default_factory=dict)


class Seen(NamedTuple):
    """What is known of rows: enough to judge them, without their features.

    Attributes:
        logits: ``[rows, classes]``.
        alignment: the largest inner product of the standardised features with the direction of a
            class ``[rows]``.
        log_norm: logarithm of the norm of the standardised features ``[rows]``.
    """

    logits: np.ndarray
    alignment: np.ndarray
    log_norm: np.ndarray

    @classmethod
    def of(
        cls,
        network: nn.Module,
        features: Float[torch.Tensor, "rows features"],
        directions: np.ndarray,
    ) -> "Seen":
        """Pass standardised features through a network."""
        with torch.inference_mode():
            logits = network(features).numpy().astype(np.float64)
        wide = features.numpy().astype(np.float64)
        norms = np.maximum(np.linalg.norm(wide, axis=1), np.finfo(np.float32).tiny)
        return cls(logits, (wide @ directions.T).max(axis=1), np.log(norms))

    @classmethod
    def join(cls, parts: Sequence["Seen"]) -> "Seen":
        """Rows of several blocks, one below the other."""
        return cls(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class Judged(NamedTuple):
    """Verdicts on rows, as arrays.

    Attributes:
        probabilities: calibrated ``[rows, classes]``.
        sets: which classes are in the conformal set ``[rows, classes]``.
        scores: how strange, see `Verdict.score`; nan where it cannot be told ``[rows]``.
        reasons: keys of `ABSTENTIONS`, empty where the bundle answers ``[rows]``.
    """

    probabilities: np.ndarray
    sets: np.ndarray
    scores: np.ndarray
    reasons: np.ndarray

    def abstain(self, where: np.ndarray | bool, reason: str) -> "Judged":
        """With this reason instead of any other where it applies."""
        return self._replace(reasons=np.where(where, reason, self.reasons))

    def verdicts(self, classes: tuple[str, ...]) -> list[Verdict]:
        """One a row."""
        return [self._verdict(row, classes) for row in range(len(self.reasons))]

    def _verdict(self, row: int, classes: tuple[str, ...]) -> Verdict:
        values, reason, score = self.probabilities[row], str(self.reasons[row]), self.scores[row]
        order = np.argsort(-values).tolist()
        best = classes[order[0]]
        return Verdict(
            label=None if reason else best,
            confidence=float(values[order[0]]),
            probabilities={classes[k]: float(values[k]) for k in order},
            score=float(score) if np.isfinite(score) else None,
            reason=reason,
            conformal_set=tuple(classes[k] for k in order if self.sets[row, k]),
        )


@dataclass(frozen=True, eq=False)
class Confidence:
    """Fitted state that turns what is seen of adapters into verdicts.

    Kernel features of what resembles no adapter lie near one common point, where distances to
    classes are small. So it is agreement with a class that tells the known from the unknown, and
    the norm of the features that gives garbage away.

    Attributes:
        directions: unit vector from the centre of the features to the mean of each class
            ``[classes, features]``.
        calibration: the numbers; None where there are none.
    """

    directions: np.ndarray
    calibration: Calibration | None = None

    def judge(self, seen: Seen) -> Judged:
        """Judge rows; what is not finite, or without calibration, is abstained from."""
        held = self.calibration
        finite = np.asarray(np.isfinite(seen.logits).all(axis=1))
        logits = np.where(finite[:, None], seen.logits, 0)
        if held is None:
            every, none = np.ones(logits.shape, bool), np.full(len(logits), np.nan)
            return Judged(softmax(logits, axis=1), every, none, np.full(len(none), "uncalibrated"))
        probabilities = softmax(logits / held.temperature, axis=1)
        excess = seen.log_norm - held.log_norm
        norm = np.abs(excess) / held.spread
        if held.met is not None:
            furthest, aligned = held.met
            known = (excess > 0) & (excess <= furthest) & (seen.alignment >= aligned)
            norm = np.where(known, 0, norm)
        strange = (held.usual - seen.alignment) / (held.usual - held.least)
        judged = Judged(
            probabilities,
            conformal_sets(probabilities, held.conformal) | ~finite[:, None],
            np.where(finite, np.where(norm > 1, np.maximum(norm, strange), strange), np.nan),
            np.where(strange > 1, "unfamiliar", ""),
        )
        return judged.abstain(norm > 1, "out-of-range").abstain(~finite, "not-finite")


class Reliabilities(NamedTuple):
    """A fitted confidence, and how reliable probabilities of test rows are without and with it."""

    confidence: Confidence
    before: Reliability
    after: Reliability


def fit_confidence(prepared: Prepared, module: LoraModule) -> Reliabilities:
    """Fit temperature, abstention and conformal sets on the validation rows of a finished seed.

    With few validation rows the rate of abstention is the lowest that they can promise: one in as
    many as there are, plus one.

    Args:
        prepared: the data that the seed saw, with classes.
        module: its network, on the CPU.
    """
    directions = _directions(prepared)
    seen = _see(prepared, module, prepared.split.val, directions)
    labels = prepared.labels[prepared.split.val]
    rate = max(RATE, 1 / (len(labels) + 1))
    usual, log_norm = float(np.median(seen.alignment)), float(np.median(seen.log_norm))
    # Targets that are not quite 1 keep few rows, all named rightly, from promising certainty.
    temperature = fit_temperature(seen.logits, labels, smoothing=1 / (len(labels) + 1))
    probabilities = softmax(seen.logits / temperature, axis=1)
    spread = max(SLACK * float(np.abs(seen.log_norm - log_norm).max()), SMALLEST_GAP)
    trained = _see(prepared, module, prepared.split.train, directions)
    held = Calibration(
        rows=len(labels),
        temperature=temperature,
        rate=rate,
        usual=usual,
        least=min(-threshold_at(-seen.alignment, rate), usual - SMALLEST_GAP),
        log_norm=log_norm,
        spread=spread,
        met=_met(trained, log_norm, spread, rate),
        alpha=ALPHA,
        conformal=conformal_threshold(probabilities, labels, ALPHA),
    )
    return _tested(Confidence(directions, held), prepared, module)


def _met(trained: Seen, log_norm: float, spread: float, rate: float) -> tuple[float, float] | None:
    """See `Calibration.met`."""
    excess = trained.log_norm - log_norm
    beyond = excess > spread
    if not beyond.any():
        return None
    aligned = float(np.quantile(trained.alignment[beyond], rate))
    return SLACK * float(excess.max()), aligned


def measures(judged: Judged, labels: np.ndarray) -> dict[str, float | None]:
    """What verdicts on known rows are worth: `Calibration.test` without ``ece_raw``.

    Args:
        judged: the verdicts.
        labels: the true classes ``[rows]``.
    """
    hits = judged.probabilities.argmax(axis=1) == labels
    answered = judged.reasons == ""
    return {
        "ece": expected_calibration_error(judged.probabilities, labels).error,
        "abstained": float(1 - answered.mean()),
        "accuracy_answered": float(hits[answered].mean()) if answered.any() else None,
        "coverage": float(judged.sets[np.arange(len(labels)), labels].mean()),
        "set_size": float(judged.sets.sum(axis=1).mean()),
    }


def _tested(confidence: Confidence, prepared: Prepared, module: LoraModule) -> Reliabilities:
    """With what it does on the test rows."""
    rows, held = prepared.split.test, confidence.calibration
    assert held is not None
    labels, seen = prepared.labels[rows], _see(prepared, module, rows, confidence.directions)
    judged = confidence.judge(seen)
    before = expected_calibration_error(softmax(seen.logits, axis=1), labels)
    after = expected_calibration_error(judged.probabilities, labels)
    test = {"ece_raw": before.error, **measures(judged, labels)}
    return Reliabilities(replace(confidence, calibration=replace(held, test=test)), before, after)


def _see(prepared: Prepared, module: LoraModule, rows: np.ndarray, directions: np.ndarray) -> Seen:
    mean, scale = torch.from_numpy(prepared.mean), torch.from_numpy(prepared.scale)
    parts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = torch.as_tensor(prepared.features[rows[start : start + ROWS_AT_ONCE]])
        parts.append(Seen.of(module.model, (block - mean) / scale, directions))
    return Seen.join(parts)


def _directions(prepared: Prepared) -> np.ndarray:
    """Unit vectors to the class means of the standardised training rows; 0 for a class without."""
    features, train = np.asarray(prepared.features), prepared.split.train
    found = np.zeros((len(prepared.classes), features.shape[1]))
    for label in np.unique(prepared.labels[train]):
        rows = train[prepared.labels[train] == label]
        found[label] = (column_moments(features, rows=rows)[0] - prepared.mean) / prepared.scale
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.where(norms > 0, norms, 1)).astype(np.float32)
