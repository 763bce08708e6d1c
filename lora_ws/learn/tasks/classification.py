"""`Classification`: one of several classes."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from lora_ws.collection import AdapterSet
from lora_ws.errors import DataError
from lora_ws.learn.tasks.base import NamedTask, Parts

if TYPE_CHECKING:
    from lora_ws.learn.metrics import Measured


class Classification(NamedTask):
    """Choose one of several classes: cross-entropy, the paper's metrics.

    Example:
        >>> Classification().fit(np.array([0, 1, 1]), ("cat", "dog")).outputs
        2
    """

    name = "classification"
    target = "class"
    quality = "accuracy"
    # Accuracy on few validation rows cannot tell experiments apart.
    selects = "auroc"
    takes_classifiers = True
    takes_regressors = True
    stratifies = True

    def read(
        self, adapters: AdapterSet, label: str | None
    ) -> tuple[Int[np.ndarray, " adapters"], tuple[str, ...]]:
        """Read the class of each adapter as its number."""
        return adapters.labels(label)

    def check(
        self, name: str, targets: Int[np.ndarray, " rows"], classes: tuple[str, ...], least: int
    ) -> None:
        """Refuse classes of fewer rows.

        Raises:
            DataError: there is one.
        """
        check_classes(name, targets, classes, least)

    def loss(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Int[Tensor, "*models rows"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Cross-entropy, in nats."""
        flat = F.cross_entropy(
            outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), reduction=reduction
        )
        return flat.reshape(targets.shape) if reduction == "none" else flat

    def predict(
        self, outputs: Float[Tensor, "*models rows outputs"]
    ) -> Float[Tensor, "*models rows outputs"]:
        """Probabilities."""
        return outputs.softmax(-1)

    def score(
        self, outputs: Float[Tensor, "*models rows outputs"], targets: Int[Tensor, "*models rows"]
    ) -> Shaped[Tensor, "*models rows"]:
        """Hits."""
        return outputs.argmax(-1) == targets

    def measure(self, parts: Parts, part: str) -> "Measured":
        """The paper's five (macro averages, AUROC one against the rest) and the confusion."""
        from lora_ws.learn.metrics import class_metrics, computed

        return computed(class_metrics(self.outputs), *parts(part))

    def members(self, targets: Int[np.ndarray, " rows"]) -> Bool[np.ndarray, "rows classes"]:
        """Its class alone."""
        return targets[:, None] == np.arange(self.outputs)


def check_classes(
    name: str, targets: Int[np.ndarray, " rows"], classes: tuple[str, ...], least: int
) -> None:
    """Refuse classes of fewer rows.

    Args:
        name: of the collection or part, for the error.
        targets: numbers of the classes.
        classes: their names.
        least: how many rows each class needs.

    Raises:
        DataError: there is one.
    """
    if len(classes) < 2:
        got = "".join(f"only `{label}`" for label in classes) or "none"
        raise DataError(
            f"{name}: expected two classes or more, got {got}; add adapters of "
            "another class, such as ones of nothing in particular, or choose another --label; "
            "`lora-ws similar` finds what is like adapters of one kind without any training"
        )
    counts = np.bincount(targets, minlength=len(classes))
    if counts.min() < least:
        raise DataError(
            f"{name}: expected at least {least} adapters of each class, got {counts.min()} of "
            f"`{classes[counts.argmin()]}`; add some, or leave the class out"
        )
