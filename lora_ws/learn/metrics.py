"""What tasks are measured by.

A metric that is added here is recorded, and shown under its key wherever metrics are;
`lora_ws.report.metrics.METRICS` gives it a title, a unit and a direction.
"""

from typing import Any

from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.regression import MeanAbsoluteError, R2Score, SpearmanCorrCoef


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


def regression_metrics() -> MetricCollection:
    """Share of variance explained (0 for the mean), mean absolute error, rank correlation.

    They measure what they are given; they do not ask other processes.
    """
    own: dict[str, Any] = {"sync_on_compute": False}
    return MetricCollection(
        {
            "r2": R2Score(**own),
            "mae": MeanAbsoluteError(**own),
            "spearman": SpearmanCorrCoef(**own),
        },
        compute_groups=False,
    )
