"""Metrics as tables show them: title, unit, and which way is better.

Whatever a record holds is shown: metrics listed here in this order, then all others under their own
names.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora_ws.report.grid import Cell, ranked
from lora_ws.report.records import RunRecord, Summary, summarise

MISSING = "–"


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
        title: of its column.
        percent: whether it is a share from 0 to 1; otherwise it is shown as it is.
        higher_is_better: which value of a column is the best.
    """

    title: str
    percent: bool = True
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        """The title inside a sentence."""
        return self.title if self.title.isupper() else self.title.lower()

    @property
    def axis(self) -> str:
        """Label of an axis."""
        return f"{self.name}, percent" if self.percent else self.name

    def on_axis(self, summary: Summary) -> tuple[float, float]:
        """Mean and standard deviation in the unit of the axis."""
        return summary.percents if self.percent else (summary.mean, summary.std)

    def text(self, summary: Summary | None, missing: str = MISSING) -> str:
        """Mean ± sample standard deviation; no spread where there is one seed."""
        if summary is None:
            return missing
        return summary.percent() if self.percent else summary.plain()

    def column(
        self, summaries: Sequence[Summary | None], missing: str | Sequence[str] = MISSING
    ) -> list[Cell]:
        """A column of a table, its best value and the second best marked.

        Args:
            summaries: a cell each; None where the metric was not measured.
            missing: what such a cell says, or what each of them would.
        """
        reasons = [missing] * len(summaries) if isinstance(missing, str) else missing
        texts = [self.text(s, why) for s, why in zip(summaries, reasons, strict=True)]
        sign = 1 if self.higher_is_better else -1
        return ranked([sign * s.mean if s else None for s in summaries], texts)


METRICS = {
    "mean_over_tasks": Metric("Mean over tasks"),
    "accuracy": Metric("Accuracy"),
    "accuracy_seen": Metric("Accuracy, seen classes"),
    "accuracy_unseen": Metric("Accuracy, unseen classes"),
    "chance_seen": Metric("Chance, seen classes"),
    "chance_unseen": Metric("Chance, unseen classes"),
    "generalised_seen": Metric("Generalised accuracy, seen classes"),
    "generalised_unseen": Metric("Generalised accuracy, unseen classes"),
    "generalised": Metric("Generalised accuracy, harmonic mean"),
    "auroc": Metric("AUROC"),
    "precision": Metric("Precision"),
    "recall": Metric("Recall"),
    "f1": Metric("F1"),
    "average_precision": Metric("Average precision"),
    "average_precision_constant": Metric("Average precision of a constant"),
    "f1_macro_tuned": Metric("Macro F1, tuned"),
    "f1_micro_tuned": Metric("Micro F1, tuned"),
    "f1_macro": Metric("Macro F1 at 0.5"),
    "f1_micro": Metric("Micro F1 at 0.5"),
    "f1_macro_constant": Metric("Macro F1 of a constant"),
    "f1_micro_constant": Metric("Micro F1 of a constant"),
    "jaccard": Metric("Jaccard index"),
    "r2": Metric("R²", percent=False),
    "mae": Metric("Mean absolute error", percent=False, higher_is_better=False),
    "rmse": Metric("Root mean squared error", percent=False, higher_is_better=False),
    "spearman": Metric("Spearman", percent=False),
    "kendall": Metric("Kendall", percent=False),
    "map": Metric("Mean average precision"),
    "map_chance": Metric("Mean average precision at chance"),
    "knn_accuracy": Metric("Nearest neighbours"),
    "one_class_neighbours": Metric("One class, neighbours"),
    "one_class_mahalanobis": Metric("One class, Mahalanobis"),
}


def metric_of(name: str) -> Metric:
    """How a metric is shown; one that is not listed under its own name, as it is.

    Example:
        >>> metric_of("num_images.mae").title
        'num_images: Mean absolute error'
    """
    column, _, own = name.rpartition(".")
    if column and own in METRICS:
        return METRICS[own]._replace(title=f"{column}: {METRICS[own].title}")
    return METRICS.get(name, Metric(name, percent=False))


def ordered(names: Iterable[str]) -> list[str]:
    """Each name once: those in `METRICS` in its order, then the others in theirs.

    Example:
        >>> ordered(["kappa", "f1", "accuracy", "f1"])
        ['accuracy', 'f1', 'kappa']
    """
    given = dict.fromkeys(names)
    return [name for name in METRICS if name in given] + [n for n in given if n not in METRICS]


def metrics_of(groups: Iterable[Sequence[RunRecord]]) -> list[str]:
    """Names of all metrics that any of the records holds, in the order of a table."""
    return ordered(name for records in groups for record in records for name in record.test)


def measured(records: Sequence[RunRecord], metric: str, part: str = "test") -> Summary | None:
    """Summarise a metric over the seeds; None where a record does not hold it, or there is none.

    Args:
        records: of one experiment.
        metric: its name.
        part: "val" or "test".
    """
    if not records or any(metric not in getattr(record, part) for record in records):
        return None
    return summarise(records, metric, part)
