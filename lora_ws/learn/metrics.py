"""What tasks are measured by.

A metric that is added here is recorded, and shown under its key wherever metrics are;
`lora_ws.report.metrics.METRICS` gives it a title, a unit and a direction.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)
from torchmetrics.regression import (
    MeanAbsoluteError,
    MeanSquaredError,
    R2Score,
    SpearmanCorrCoef,
)

from lora_ws.functional.retrieval import (
    average_precisions,
    chance_average_precision,
    mahalanobis_distance,
    nearest_classes,
    neighbour_distance,
)

Confusion = tuple[tuple[int, ...], ...]


class Measured(NamedTuple):
    """The metrics of a network on some rows, which class was taken for which, and predictions.

    Attributes:
        values: by metric.
        confusion: rows by true class (row) and predicted class (column); empty without classes.
        scores: predictions ``[rows, ...]``: probabilities, numbers, embeddings.
        truth: targets ``[rows, ...]``.
    """

    values: dict[str, float]
    confusion: Confusion
    scores: Tensor
    truth: Tensor


def computed(metrics: MetricCollection, scores: Tensor, truth: Tensor) -> Measured:
    """Values of metrics for predictions."""
    metrics.reset()
    metrics.update(scores, truth)
    values = metrics.compute()
    confusion = ()
    if "confusion" in values:
        confusion = tuple(tuple(row) for row in values.pop("confusion").long().tolist())
    named = {name: float(value) for name, value in values.items()}
    return Measured(named, confusion, scores.cpu(), truth.cpu())


def class_metrics(num_classes: int) -> MetricCollection:
    """The paper's five metrics (macro averages, AUROC one against the rest) and the confusion.

    They measure what they are given; they do not ask other processes.
    """
    own: dict[str, Any] = {"num_classes": num_classes, "sync_on_compute": False}
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(average="micro", **own),
            "auroc": MulticlassAUROC(average="macro", **own),
            "precision": MulticlassPrecision(average="macro", **own),
            "recall": MulticlassRecall(average="macro", **own),
            "f1": MulticlassF1Score(average="macro", **own),
            "confusion": MulticlassConfusionMatrix(**own),
        },
        compute_groups=False,
    )


def present_class_metrics(
    probabilities: Float[Tensor, "rows classes"], truth: Int[Tensor, " rows"]
) -> dict[str, float]:
    """`class_metrics` but for the confusion, of rows that need not be of every class.

    Macro averages are over the classes that rows are of; a class that none is of can only be named
    wrongly. AUROC of rows of one class is NaN.

    Args:
        probabilities: of each class.
        truth: class of each row.

    Example:
        >>> from torch import tensor
        >>> scores = tensor([[0.7, 0.2, 0.1], [0.3, 0.1, 0.6]])
        >>> present_class_metrics(scores, tensor([0, 2]))["recall"]
        1.0
    """
    present, classes = truth.unique(), probabilities.shape[1]
    measured = {
        "auroc": multiclass_auroc,
        "precision": multiclass_precision,
        "recall": multiclass_recall,
        "f1": multiclass_f1_score,
    }
    with warnings.catch_warnings():
        # Of classes without rows, which are left out.
        warnings.simplefilter("ignore", UserWarning)
        each = {
            name: measure(probabilities, truth, classes, average="none")
            for name, measure in measured.items()
        }
    values = {name: float(found[present].mean()) for name, found in each.items()}
    if len(present) == 1:
        values["auroc"] = float("nan")
    return {"accuracy": float((probabilities.argmax(1) == truth).float().mean()), **values}


def label_metrics(
    probabilities: Float[np.ndarray, "rows labels"],
    truth: Float[np.ndarray, "rows labels"],
    thresholds: Sequence[float],
    shares: Sequence[float],
) -> dict[str, float]:
    """F1 at 0.5 and at thresholds, mean AUROC and mean average precision; a constant's beside.

    AUROC and average precision are means over the labels that some rows have and others lack; NaN
    where there are none. F1 is 0 of a label that is neither predicted nor true.

    Args:
        probabilities: of each label ``[rows, labels]``.
        truth: 1 where it applies ``[rows, labels]``.
        thresholds: of each label, chosen on other rows.
        shares: of the training rows that have each label: what a constant predicts for every row.
            At thresholds chosen for it, it predicts every label that any row has.
    """
    told = np.flatnonzero((truth.min(axis=0) == 0) & (truth.max(axis=0) == 1))
    pairs = [(truth[:, label], probabilities[:, label]) for label in told]
    constant = np.broadcast_to(np.asarray(shares) > 0, truth.shape)
    values = {
        "auroc": _mean([roc_auc_score(*pair) for pair in pairs]),
        "average_precision": _mean([average_precision_score(*pair) for pair in pairs]),
        "average_precision_constant": _mean([float(true.mean()) for true, _ in pairs]),
    }
    said = {
        "": probabilities >= 0.5,
        "_tuned": probabilities >= np.asarray(thresholds),
        "_constant": constant,
    }
    none: Any = {"zero_division": 0}
    for suffix, yes in said.items():
        for average in ("macro", "micro"):
            values[f"f1_{average}{suffix}"] = float(f1_score(truth, yes, average=average, **none))
    return values


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def zero_shot_metrics(
    scores: Float[np.ndarray, "rows classes"],
    truth: Int[np.ndarray, " rows"],
    seen: Bool[np.ndarray, " classes"],
) -> dict[str, float]:
    """Accuracy on rows of seen and of unseen classes, among these alone and among all classes.

    *Generalised* is the accuracy among all classes (Chao et al. 2016), with the harmonic mean of
    both kinds of rows (Xian et al. 2017); chance is one in as many as there are candidates.

    Args:
        scores: the higher, the more likely.
        truth: class of each row.
        seen: whether training rows show a class.
    """
    own = np.where(seen == seen[truth][:, None], scores, -np.inf).argmax(axis=1) == truth
    among_all = scores.argmax(axis=1) == truth
    values = {"accuracy": float(own.mean())}
    for kind, members in (("seen", seen), ("unseen", ~seen)):
        if (rows := members[truth]).any():
            values[f"accuracy_{kind}"] = float(own[rows].mean())
            values[f"chance_{kind}"] = 1 / int(members.sum())
            values[f"generalised_{kind}"] = float(among_all[rows].mean())
    both = [values[key] for key in ("generalised_seen", "generalised_unseen") if key in values]
    if len(both) == 2:
        values["generalised"] = 2 * both[0] * both[1] / sum(both) if all(both) else 0.0
    return values


def embedding_metrics(
    gallery: Float[np.ndarray, "gallery width"],
    gallery_keys: Int[np.ndarray, "gallery keys"],
    queries: Float[np.ndarray, "queries width"],
    query_keys: Int[np.ndarray, "queries keys"],
    *,
    n_neighbors: int,
) -> dict[str, float]:
    """Retrieval of queries in a gallery, nearest neighbours, and one class against the rest.

    Args:
        gallery: embeddings of norm 1.
        gallery_keys: class of each, then codes: rows that share one are not looked up.
        queries: embeddings of norm 1.
        query_keys: alike.
        n_neighbors: rows that vote for a class.
    """
    known, labels = gallery_keys[:, 0], query_keys[:, 0]
    similarities = queries @ gallery.T
    relevant = labels[:, None] == known
    excluded = (query_keys[:, None, 1:] == gallery_keys[None, :, 1:]).any(-1)
    chance = chance_average_precision((relevant & ~excluded).sum(1), (~excluded).sum(1))
    voted = nearest_classes(similarities, known, excluded, n_neighbors)
    one_class: dict[str, list[float]] = {"neighbours": [], "mahalanobis": []}
    for label in np.unique(known):
        own, truth = gallery[known == label], labels != label
        if truth.all() or not truth.any():
            continue
        for name, score in (
            ("neighbours", neighbour_distance),
            ("mahalanobis", mahalanobis_distance),
        ):
            one_class[name].append(float(roc_auc_score(truth, score(own, queries))))
    return {
        "map": float(np.nanmean(average_precisions(similarities, relevant, excluded))),
        "map_chance": float(np.nanmean(chance)),
        "knn_accuracy": float((voted == labels).mean()),
        **{f"one_class_{name}": _mean(values) for name, values in one_class.items()},
    }


def regression_metrics() -> MetricCollection:
    """Share of variance explained (0 for the mean), mean errors, rank correlation.

    They measure what they are given; they do not ask other processes.
    """
    own: dict[str, Any] = {"sync_on_compute": False}
    return MetricCollection(
        {
            "r2": R2Score(**own),
            "mae": MeanAbsoluteError(**own),
            "rmse": MeanSquaredError(squared=False, **own),
            "spearman": SpearmanCorrCoef(**own),
        },
        compute_groups=False,
    )
