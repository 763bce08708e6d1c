"""How far a network may be believed: calibrated probabilities, and when to abstain.

`lora_ws.learn.calibration` fits it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from lora_ws.bundle.heads import Answer, named
from lora_ws.functional.calibrate import (
    conformal_sets,
    expected_calibration_error,
    sigmoid,
    softmax,
)

if TYPE_CHECKING:
    from lora_ws.models.module import MetanetModule

# Embedding and outputs of raw rows.
Reads = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
ROWS_AT_ONCE = 256
ABSTENTIONS = {
    "uncalibrated": "the bundle holds no calibration; train it again with this version",
    "projected": "the weights were projected, and the bundle reads numbers that this changes",
    "not-finite": "the weights or what is made of them hold NaN or infinite values",
    "out-of-range": "its features are much smaller or larger than those of known adapters",
    "out-of-distribution": "it resembles none of the classes",
}


@dataclass(frozen=True)
class Prediction:
    """What a bundle predicts for one adapter.

    Attributes:
        label: the class, or the labels that apply, joined; None where the bundle abstains.
        confidence: calibrated probability of the most probable class, given that it is one of them.
        probabilities: of all classes, the most probable first.
        ood_score: how far out of distribution the adapter is: 0 for the median known one, above 1
            the bundle abstains; None where it is unknown.
        reason: why it abstains, a key of `ABSTENTIONS`; empty where it does not.
        conformal_set: classes among which the true one of a known adapter is in the share of cases
            that the calibration states; all of them where the bundle is not calibrated.
        labels: of a bundle whose labels do not exclude each other, those whose probability reaches
            their threshold, the most probable first.
        answers: of a bundle of several tasks, predictions of the further ones, by column.
    """

    label: str | None
    confidence: float
    probabilities: dict[str, float]
    ood_score: float | None
    reason: str
    conformal_set: tuple[str, ...]
    labels: tuple[str, ...] = ()
    answers: dict[str, Answer] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; ``score`` is the old name of ``ood_score``, for one release."""
        answers = {column: asdict(answer) for column, answer in self.answers.items()}
        return {**vars(self), "answers": answers, "score": self.ood_score}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Prediction":
        """Inverse of `to_dict`, also after JSON."""
        kept = {name: value for name, value in data.items() if name != "score"}
        tuples = {name: tuple(kept.get(name, ())) for name in ("conformal_set", "labels")}
        answers = {k: Answer.from_dict(v) for k, v in kept.get("answers", {}).items()}
        return cls(**{**kept, **tuples, "answers": answers})


@dataclass(frozen=True)
class Calibration:
    """The numbers fitted on rows that were not trained on, and what they do on the test rows.

    Attributes:
        rows: how many: validation rows, or all trained on where ``out_of_fold``.
        temperature: what logits are divided by.
        abstention_rate: share of known adapters that may be taken for out of distribution.
        median_alignment: of the validation rows, see `NetworkOutputs.alignment`.
        min_alignment: the lowest alignment that is answered.
        log_norm: median logarithm of the norm of standardised embeddings.
        spread: how far from it an answered one may be.
        alpha: share of known adapters whose conformal set may lack the true class.
        conformal: threshold of conformal sets.
        train_norm: None, or, where training rows are further above it than that (a kernel has met
            them), how far above an answered one may be that is at least as aligned as these, and
            the least alignment of these.
        out_of_fold: whether networks of the same spec, each fitted without some of the training
            rows, given what to expect of these.
        test: on the test rows, ``ece_raw`` and ``ece`` (expected calibration error before and after
            the temperature), ``abstained``, ``accuracy_answered`` (None without any), ``coverage``
            and mean ``set_size`` of the conformal sets.
    """

    rows: int
    temperature: float
    abstention_rate: float
    median_alignment: float
    min_alignment: float
    log_norm: float
    spread: float
    alpha: float
    conformal: float
    train_norm: tuple[float, float] | None = None
    out_of_fold: bool = False
    test: dict[str, float | None] = field(default_factory=dict)


class NetworkOutputs(NamedTuple):
    """What a network makes of rows: enough to predict from, without their embeddings.

    Attributes:
        logits: ``[rows, classes]``.
        alignment: the largest inner product of the standardised embedding with the direction of a
            class ``[rows]``.
        log_norm: logarithm of the norm of the standardised embedding ``[rows]``.
    """

    logits: np.ndarray
    alignment: np.ndarray
    log_norm: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["NetworkOutputs"]) -> "NetworkOutputs":
        """Rows of several blocks, one below the other."""
        return cls(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class Predictions(NamedTuple):
    """Predictions for rows, as arrays.

    Attributes:
        probabilities: calibrated ``[rows, classes]``.
        sets: which classes are in the conformal set ``[rows, classes]``.
        ood_scores: see `Prediction.ood_score`; nan where it cannot be computed ``[rows]``.
        reasons: keys of `ABSTENTIONS`, empty where the bundle answers ``[rows]``.
    """

    probabilities: np.ndarray
    sets: np.ndarray
    ood_scores: np.ndarray
    reasons: np.ndarray

    def abstain(self, where: np.ndarray | bool, reason: str) -> "Predictions":
        """With this reason instead of any other where it applies."""
        return self._replace(reasons=np.where(where, reason, self.reasons))

    def per_adapter(
        self, classes: tuple[str, ...], thresholds: tuple[float, ...] = ()
    ) -> list[Prediction]:
        """One prediction per row; see `Confidence.thresholds`."""
        return [self._one(row, classes, thresholds) for row in range(len(self.reasons))]

    def _one(self, row: int, classes: tuple[str, ...], thresholds: tuple[float, ...]) -> Prediction:
        values, reason, score = (
            self.probabilities[row],
            str(self.reasons[row]),
            self.ood_scores[row],
        )
        order, label, labels = named(values, classes, thresholds)
        return Prediction(
            label=None if reason else label,
            confidence=float(values[order[0]]),
            probabilities={classes[k]: float(values[k]) for k in order},
            ood_score=float(score) if np.isfinite(score) else None,
            reason=reason,
            conformal_set=tuple(classes[k] for k in order if self.sets[row, k]),
            labels=labels,
        )


@dataclass(frozen=True, eq=False)
class Confidence:
    """Fitted state that turns outputs of a network into predictions.

    Kernel features of what resembles no adapter lie near one common point, where distances to
    classes are small. So it is agreement with a class that tells the known from the unknown, and
    the norm of the embedding that gives garbage away.

    Attributes:
        centre: mean of each column of the embeddings of training rows ``[width]``.
        scale: their standard deviation, 1 where it is 0 ``[width]``.
        directions: unit vector from the centre to the mean of each class, in standardised
            embeddings ``[classes, width]``.
        calibration: the numbers; None where there are none.
        thresholds: probability of each label from which on it applies; empty where classes exclude
            each other.
    """

    centre: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    calibration: Calibration | None = None
    thresholds: tuple[float, ...] = ()

    def probabilities(
        self, logits: Float[np.ndarray, "rows classes"], temperature: float = 1.0
    ) -> Float[np.ndarray, "rows classes"]:
        """Of classes that exclude each other, or of each label on its own."""
        return (sigmoid if self.thresholds else softmax)(logits / temperature)

    def run(self, reads: Reads, rows: Float[np.ndarray, "rows params"]) -> NetworkOutputs:
        """Pass raw rows through a network."""
        embedding, logits = reads(rows)
        logits = logits.astype(np.float64)
        wide = ((embedding - self.centre) / self.scale).astype(np.float64)
        norms = np.maximum(np.linalg.norm(wide, axis=1), np.finfo(np.float32).tiny)
        return NetworkOutputs(logits, (wide @ self.directions.T).max(axis=1), np.log(norms))

    def predict(self, outputs: NetworkOutputs) -> Predictions:
        """Predict, or abstain; what is not finite, or without calibration, is abstained from."""
        held = self.calibration
        finite = np.asarray(np.isfinite(outputs.logits).all(axis=1))
        logits = np.where(finite[:, None], outputs.logits, 0)
        if held is None:
            every, none = np.ones(logits.shape, bool), np.full(len(logits), np.nan)
            shares = self.probabilities(logits)
            return Predictions(shares, every, none, np.full(len(none), "uncalibrated"))
        probabilities = self.probabilities(logits, held.temperature)
        excess = outputs.log_norm - held.log_norm
        norm = np.abs(excess) / held.spread
        if held.train_norm is not None:
            furthest, aligned = held.train_norm
            known = (excess > 0) & (excess <= furthest) & (outputs.alignment >= aligned)
            norm = np.where(known, 0, norm)
        distance = (held.median_alignment - outputs.alignment) / (
            held.median_alignment - held.min_alignment
        )
        judged = Predictions(
            probabilities,
            conformal_sets(probabilities, held.conformal) | ~finite[:, None],
            np.where(finite, np.where(norm > 1, np.maximum(norm, distance), distance), np.nan),
            np.where(distance > 1, "out-of-distribution", ""),
        )
        return judged.abstain(norm > 1, "out-of-range").abstain(~finite, "not-finite")


def reads_by(network: "MetanetModule") -> Reads:
    """What a network of torch makes of rows."""
    import torch

    def reads(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            embedding = network.embed(torch.from_numpy(rows))
            return embedding.numpy(), network.head(embedding).numpy()

    return reads


def yes_no(
    logits: Float[np.ndarray, "rows labels"], labels: Shaped[np.ndarray, "rows labels"]
) -> tuple[Float[np.ndarray, "decisions two"], Int[np.ndarray, " decisions"]]:
    """Logits of labels, each on its own, as those of decisions between two classes, no and yes."""
    flat = logits.ravel()
    return np.stack([np.zeros_like(flat), flat], axis=1), labels.ravel().astype(np.int64)


def measures(
    judged: Predictions, labels: np.ndarray, thresholds: tuple[float, ...] = ()
) -> dict[str, float | None]:
    """What verdicts on known rows are worth: `Calibration.test` without ``ece_raw``.

    Args:
        judged: the verdicts.
        labels: the true classes ``[rows]``, or 1 where a label applies ``[rows, labels]``.
        thresholds: see `Confidence.thresholds`.
    """
    found, answered = judged.probabilities, judged.reasons == ""
    if thresholds:
        decisions = np.stack([1 - found, found], axis=-1).reshape(-1, 2)
        error = expected_calibration_error(decisions, labels.ravel().astype(np.int64)).error
        hits = ((found >= thresholds) == labels).mean(axis=1)
        covered = judged.sets[labels > 0]
    else:
        error = expected_calibration_error(found, labels).error
        hits = found.argmax(axis=1) == labels
        covered = judged.sets[np.arange(len(labels)), labels]
    return {
        "ece": error,
        "abstained": float(1 - answered.mean()),
        "accuracy_answered": float(hits[answered].mean()) if answered.any() else None,
        "coverage": float(covered.mean()) if covered.size else None,
        "set_size": float(judged.sets.sum(axis=1).mean()),
    }
