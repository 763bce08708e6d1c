"""`MultiLabel`: any number of several labels."""

from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lora_ws.collection import AdapterSet
from lora_ws.errors import DataError
from lora_ws.functional.thresholds import f1_threshold
from lora_ws.learn.tasks.base import NamedTask, Parts

if TYPE_CHECKING:
    from lora_ws.learn.metrics import Measured

# How much more a rare label's rows may count.
HEAVIEST = 10.0


@final
class MultiLabel(NamedTask):
    """Say which of several labels apply: binary cross-entropy of each.

    Labels come from a column of lists, such as ``attributes`` of lora-ws-mini, or from several
    columns of 0 and 1, named as ``--label cat,red``. Beside F1 at 0.5 and at thresholds chosen on
    the validation rows, mean AUROC and mean average precision, records hold what a constant gets
    (each label's share in the training rows, at thresholds chosen alike): much of a high accuracy
    on rare labels is that.

    Args:
        columns: deprecated, name them as label, separated by commas.
        pos_weight: count rows that have a label n_neg / n_pos times as much, within 1 to 10.

    Attributes:
        classes_: names of the labels, sorted.
        shares_: share of the training rows that have each.

    Example:
        >>> task = MultiLabel().fit(np.array([[1, 0], [1, 1]], np.float32), ("big", "red"))
        >>> task.outputs, task.shares_
        (2, (1.0, 0.5))
    """

    name = "multilabel"
    target = "labels"
    needs_label = "a column of lists of labels, or several of 0 and 1 separated by commas"
    quality = "jaccard"
    selects = "average_precision"
    takes_regressors = True

    def __init__(self, *, columns: tuple[str, ...] = (), pos_weight: bool = False) -> None:
        self.columns = columns
        self.pos_weight = pos_weight

    def read(
        self, adapters: AdapterSet, label: str | None
    ) -> tuple[Float[np.ndarray, "adapters labels"], tuple[str, ...]]:
        """Read 1 where a label applies, 0 elsewhere."""
        return adapters.label_lists(label)

    def check(self, name: str, targets: np.ndarray, classes: tuple[str, ...], least: int) -> None:
        """Refuse rows of which no label tells any from the others.

        Raises:
            DataError: they are such.
        """
        if not len(targets) or not _told(targets).any():
            raise DataError(
                f"{name}: expected a label that some adapters have and others lack, got none of "
                f"{len(classes)} labels; choose another label"
            )

    def learn(self, targets: Float[np.ndarray, "rows labels"], classes: tuple[str, ...]) -> None:
        """Take the names, and the share of the rows that has each."""
        super().learn(targets, classes)
        self.shares_ = tuple(targets.mean(axis=0).tolist())

    def loss(
        self,
        outputs: Float[Tensor, "*models rows labels"],
        targets: Float[Tensor, "*models rows labels"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Binary cross-entropy in nats, the mean over labels."""
        weight = outputs.new_tensor(self._weights()) if self.pos_weight else None
        each = F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), pos_weight=weight, reduction="none"
        ).mean(-1)
        return each if reduction == "none" else each.sum()

    def _weights(self) -> list[float]:
        shares = np.maximum(self.shares_, np.finfo(np.float32).tiny)
        return np.clip((1 - shares) / shares, 1, HEAVIEST).tolist()

    def predict(
        self, outputs: Float[Tensor, "*models rows labels"]
    ) -> Float[Tensor, "*models rows labels"]:
        """Probability of each label."""
        return outputs.sigmoid()

    def score(
        self,
        outputs: Float[Tensor, "*models rows labels"],
        targets: Float[Tensor, "*models rows labels"],
    ) -> Float[Tensor, "*models rows"]:
        """The Jaccard index of predicted and true labels at 0.5; 1 where there are none."""
        said, true = outputs > 0, targets > 0
        either = (said | true).sum(-1)
        found = (said & true).sum(-1) / either.clamp(min=1)
        return torch.where(either == 0, 1.0, found)

    def measure(self, parts: Parts, part: str) -> "Measured":
        """F1, AUROC and average precision, and what a constant gets."""
        from lora_ws.learn.metrics import Measured, label_metrics

        scores, truth = (value.cpu() for value in parts(part))
        chosen = self.thresholds(*(value.cpu().numpy() for value in parts("val")))
        values = label_metrics(scores.numpy(), truth.numpy(), chosen, self.shares_)
        values["jaccard"] = float(self.score(scores - 0.5, truth).mean())
        return Measured(values, (), scores, truth)

    def members(self, targets: Float[np.ndarray, "rows labels"]) -> Bool[np.ndarray, "rows labels"]:
        """The labels that apply."""
        return targets > 0

    def thresholds(
        self,
        probabilities: Float[np.ndarray, "rows labels"],
        targets: Float[np.ndarray, "rows labels"],
    ) -> tuple[float, ...]:
        """The threshold of each label with the highest F1 on these rows."""
        return tuple(
            f1_threshold(*pair) for pair in zip(probabilities.T, targets.T > 0, strict=True)
        )


def _told(targets: Float[np.ndarray, "rows labels"]) -> Bool[np.ndarray, " labels"]:
    """Which labels some rows have and others lack."""
    shares = targets.mean(axis=0)
    return (shares > 0) & (shares < 1)
