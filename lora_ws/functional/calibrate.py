"""How far a classifier's probabilities can be believed: temperature, reliability, conformal sets.

What is fitted here is fitted on rows that the classifier was not trained on.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lora_ws.errors import ConfigError

# Beyond these a softmax is a step or flat.
TEMPERATURES = (1e-2, 1e2)


class Reliability(NamedTuple):
    """How often the named class is right, by how sure the classifier is.

    Attributes:
        error: expected calibration error, the mean gap between confidence and accuracy.
        edges: borders of the bins of confidence, from 0 to 1.
        counts: rows in each bin.
        confidence: their mean confidence; nan where there are none.
        accuracy: the share of them whose named class is right; nan where there are none.
    """

    error: float
    edges: Float[np.ndarray, " borders"]
    counts: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]


def softmax(logits: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """Turn each row of logits into probabilities.

    Args:
        logits: finite ``[rows, classes]``.

    Example:
        >>> softmax(np.array([[0.0, np.log(3.0)]]))
        array([[0.25, 0.75]])
    """
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sigmoid(logits: Float[np.ndarray, "rows labels"]) -> Float[np.ndarray, "rows labels"]:
    """Turn each logit into the probability of its label alone.

    Args:
        logits: finite ``[rows, labels]``.

    Example:
        >>> sigmoid(np.array([[0.0, 800.0, -800.0]]))
        array([[0.5, 1. , 0. ]])
    """
    return np.exp(-np.logaddexp(0, -logits))


def fit_temperature(
    logits: Float[np.ndarray, "rows classes"],
    labels: Int[np.ndarray, " rows"],
    *,
    smoothing: float = 0.0,
) -> float:
    """The temperature T for which ``softmax(logits / T)`` has the least cross-entropy.

    One number, so the named class stays the same (Guo, Pleiss, Sun and Weinberger 2017). Where
    every row is classified correctly the best T is 0 and all probabilities 1; some smoothing, as
    in Platt (1999), keeps few rows from promising that.

    Args:
        logits: Of rows that were not trained on ``[rows, classes]``.
        labels: Their classes ``[rows]``.
        smoothing: Share of a row's target that is spread evenly over all classes.

    Returns:
        T, within ``TEMPERATURES``.

    Raises:
        ConfigError: If there are no rows, or the shapes do not match.

    Example:
        >>> fit_temperature(np.array([[4.0, 0.0]] * 3 + [[0.0, 4.0]]), np.zeros(4, int))
        3.640
    """
    from scipy.optimize import minimize_scalar  # slow to import, and only fitting needs it
    from scipy.special import log_softmax

    _check(logits, labels)
    wide = logits.astype(np.float64)
    rows = np.arange(len(labels))

    def cross_entropy(log_temperature: float) -> float:
        log_p = log_softmax(wide / math.exp(log_temperature), axis=1)
        named, spread = log_p[rows, labels].mean(), log_p.mean()
        return float(-(1 - smoothing) * named - smoothing * spread)

    low, high = map(math.log, TEMPERATURES)
    found = minimize_scalar(
        cross_entropy, bounds=(low, high), method="bounded", options={"xatol": 1e-8}
    )
    return math.exp(found.x)  # type: ignore[union-attr]


def expected_calibration_error(
    probabilities: Float[np.ndarray, "rows classes"],
    labels: Int[np.ndarray, " rows"],
    bins: int = 15,
) -> Reliability:
    """Mean gap between how sure the classifier is of the class it names and how often it is right.

    Bins have equal widths, are open below and closed above (Guo et al. 2017), and count by their
    rows.

    Args:
        probabilities: ``[rows, classes]``.
        labels: True classes ``[rows]``.
        bins: How many bins of confidence.

    Returns:
        The error, and the table behind a reliability plot.

    Raises:
        ConfigError: If there are no rows, the shapes do not match, or bins is not positive.

    Example:
        >>> sure = np.array([[0.9, 0.1]] * 4)
        >>> expected_calibration_error(sure, np.array([0, 0, 0, 1])).error
        0.15
    """
    _check(probabilities, labels)
    if bins < 1:
        raise ConfigError(f"expected at least 1 bin, got {bins}; 15 is usual")
    confidence = probabilities.max(axis=1).astype(np.float64)
    hits = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, bins + 1)
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(places, confidence, bins) / counts
        accuracy = np.bincount(places, hits, bins) / counts
    gaps = np.abs(accuracy - mean)[counts > 0] * counts[counts > 0]
    return Reliability(float(gaps.sum() / len(labels)), edges, counts, mean, accuracy)


def energy(logits: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, " rows"]:
    """Free energy of the logits, higher the less they speak for any class (Liu et al. 2020).

    Args:
        logits: ``[rows, classes]``.

    Returns:
        ``-log(sum(exp(logits)))`` of each row ``[rows]``.

    Example:
        >>> energy(np.array([[0.0, 0.0], [5.0, 0.0]])).round(2)
        array([-0.69, -5.01])
    """
    most = logits.max(axis=1)
    return -(most + np.log(np.exp(logits - most[:, None]).sum(axis=1)))


def threshold_at(scores: Float[np.ndarray, " rows"], rate: float) -> float:
    """The threshold that a new row like these exceeds with a probability of at most ``rate``.

    The finite-sample quantile of split conformal prediction (Vovk, Gammerman and Shafer 2005): it
    holds for any distribution, on average over draws of the rows.

    Args:
        scores: Of known rows, the higher the stranger ``[rows]``.
        rate: Above 0 and below 1.

    Returns:
        One of the scores; infinity where there are too few of them for the rate (fewer than
        1 / rate - 1).

    Raises:
        ConfigError: If the rate is out of range.

    Example:
        >>> threshold_at(np.arange(99.0), 0.05), threshold_at(np.arange(9.0), 0.05)
        (94.0, inf)
    """
    if not 0 < rate < 1:
        raise ConfigError(f"expected a rate above 0 and below 1, got {rate}; 0.05 is usual")
    # The share is often a fraction of the rows plus one, which rounding must not lift.
    place = math.ceil((len(scores) + 1) * (1 - rate) - 1e-9)
    return float(np.sort(scores)[place - 1]) if place <= len(scores) else math.inf


def conformal_threshold(
    probabilities: Float[np.ndarray, "rows classes"],
    labels: Int[np.ndarray, " rows"],
    alpha: float,
) -> float:
    """What `conformal_sets` needs to miss the true class of at most a share of new rows.

    Split conformal prediction with LAC sets, the least ambiguous ones (Sadinle, Lei and Wasserman
    2019): a class is in where its probability is high enough, the same for all classes and rows.

    Args:
        probabilities: Of rows that were not trained on ``[rows, classes]``.
        labels: Their classes ``[rows]``.
        alpha: Share of new rows whose set may lack the true class, on average over all rows.

    Returns:
        The highest ``1 - probability`` at which a class is in, at most 1, where all are.

    Raises:
        ConfigError: If there are no rows, the shapes do not match or alpha is out of range.

    Example:
        >>> conformal_threshold(np.array([[0.75, 0.25]] * 9), np.zeros(9, int), alpha=0.1)
        0.25
    """
    _check(probabilities, labels)
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return min(threshold_at(1 - own, alpha), 1.0)


def conformal_sets(
    probabilities: Float[np.ndarray, "rows classes"], threshold: float
) -> Bool[np.ndarray, "rows classes"]:
    """Which classes each row may be: those with a probability of at least ``1 - threshold``.

    A set may be empty: then no class is likely enough to be the true one of a known row.

    Args:
        probabilities: ``[rows, classes]``.
        threshold: From `conformal_threshold`.

    Returns:
        Membership ``[rows, classes]``.

    Example:
        >>> conformal_sets(np.array([[0.5, 0.4, 0.1]]), 0.7).tolist()
        [[True, True, False]]
    """
    return 1 - probabilities.astype(np.float64) <= threshold


def _check(values: np.ndarray, labels: np.ndarray) -> None:
    if values.ndim != 2 or not len(labels) or labels.shape != values.shape[:1]:
        raise ConfigError(
            f"expected values [rows, classes] and labels [rows] of at least one row, got "
            f"{values.shape} and {labels.shape}; pass the labels of the same rows"
        )
