"""`Task`: what is asked of an adapter. Everything that hangs on the kind of label is here.

A new task is one subclass and its line in `TASKS`; training, both engines, records, tables and the
choice of the best run ask the task and nothing else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, final

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from lora_ws.collection import AdapterSet
from lora_ws.errors import DataError

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class Task(ABC):
    """One kind of label: outputs, loss, predictions and metrics.

    Attributes:
        name: as specs and records have it.
        quality: what curves show beside the loss, as a key.
        selects: metric on the validation rows by which the best of several experiments is chosen;
            higher is better.
        gives_probabilities: whether predictions can be calibrated and abstained from, so that a
            bundle can hold the network.
        stratifies: whether parts are to hold the label's values alike; else the card's classes.
        needs_label: whether a label has to be named, because a card's own names classes.
    """

    name: ClassVar[str]
    quality: ClassVar[str]
    selects: ClassVar[str]
    gives_probabilities: ClassVar[bool]
    stratifies: ClassVar[bool] = True
    needs_label: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def read(
        cls, adapters: AdapterSet, label: str | None
    ) -> tuple[Shaped[np.ndarray, " adapters"], tuple[str, ...]]:
        """Read a target per adapter, and the names of classes if there are any."""

    @classmethod
    def check(
        cls, name: str, targets: Shaped[np.ndarray, " rows"], classes: tuple[str, ...], least: int
    ) -> None:
        """Refuse rows that cannot serve this task; all can unless a task says otherwise.

        Args:
            name: of the collection or part, for the error.
            targets: of the rows.
            classes: names of the classes.
            least: how many rows each class needs.
        """
        _ = name, targets, classes, least

    @classmethod
    @abstractmethod
    def fit(cls, targets: Shaped[np.ndarray, " rows"], classes: tuple[str, ...]) -> Self:
        """Learn from the training targets what outputs mean."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many outputs a network has."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none where there are no classes."""
        return ()

    @abstractmethod
    def loss(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Shaped[Tensor, "*models rows"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Sum of the loss over all rows, or the loss of each."""

    @abstractmethod
    def predict(self, outputs: Float[Tensor, "*models rows outputs"]) -> Float[Tensor, "..."]:
        """Turn outputs into probabilities of classes, or numbers."""

    @abstractmethod
    def score(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Shaped[Tensor, "*models rows"],
    ) -> Shaped[Tensor, "*models rows"]:
        """What ``quality`` is the mean of."""

    @abstractmethod
    def metrics(self) -> "MetricCollection":
        """Make the metrics of predictions and targets; they do not ask other processes."""


@final
@dataclass(frozen=True)
class Classification(Task):
    """One of several classes: cross-entropy, the paper's metrics."""

    name = "classification"
    quality = "accuracy"
    # Accuracy on few validation rows cannot tell experiments apart.
    selects = "auroc"
    gives_probabilities = True

    names: tuple[str, ...]

    @classmethod
    def read(
        cls, adapters: AdapterSet, label: str | None
    ) -> tuple[Int[np.ndarray, " adapters"], tuple[str, ...]]:
        """Read the class of each adapter as its number."""
        return adapters.labels(label)

    @classmethod
    def check(
        cls, name: str, targets: Int[np.ndarray, " rows"], classes: tuple[str, ...], least: int
    ) -> None:
        """Refuse classes of fewer rows.

        Raises:
            DataError: there is one.
        """
        counts = np.bincount(targets, minlength=len(classes))
        if counts.min() < least:
            raise DataError(
                f"{name}: expected at least {least} adapters of each class, got {counts.min()} of "
                f"`{classes[counts.argmin()]}`; add some or leave the class out"
            )

    @classmethod
    def fit(cls, targets: Int[np.ndarray, " rows"], classes: tuple[str, ...]) -> Self:
        """Take the names."""
        return cls(classes)

    @property
    def outputs(self) -> int:
        """A logit per class."""
        return len(self.names)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return self.names

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

    def metrics(self) -> "MetricCollection":
        """The paper's five (macro averages, AUROC one against the rest) and the confusion."""
        from lora_ws.learn.metrics import class_metrics

        return class_metrics(len(self.names))


@final
@dataclass(frozen=True)
class Regression(Task):
    """A number: squared error, in squares of the standard deviation of the training targets.

    Attributes:
        mean: of the training targets.
        std: their standard deviation, 1 where it is 0.
    """

    name = "regression"
    quality = "mae"
    selects = "r2"
    gives_probabilities = False
    # Numbers differ from row to row.
    stratifies = False
    needs_label = True

    mean: float
    std: float

    @classmethod
    def read(
        cls, adapters: AdapterSet, label: str | None
    ) -> tuple[Float[np.ndarray, " adapters"], tuple[str, ...]]:
        """Read the number of each adapter."""
        return adapters.targets(label), ()

    @classmethod
    def fit(cls, targets: Float[np.ndarray, " rows"], classes: tuple[str, ...]) -> Self:
        """Measure mean and standard deviation."""
        return cls(float(targets.mean()), float(targets.std()) or 1.0)

    @property
    def outputs(self) -> int:
        """One, in standard deviations from the mean."""
        return 1

    def loss(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Float[Tensor, "*models rows"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Squared error."""
        errors = ((self.predict(outputs) - targets) / self.std).square()
        return errors if reduction == "none" else errors.sum()

    def predict(
        self, outputs: Float[Tensor, "*models rows outputs"]
    ) -> Float[Tensor, "*models rows"]:
        """Numbers in the targets' unit."""
        return outputs[..., 0] * self.std + self.mean

    def score(
        self, outputs: Float[Tensor, "*models rows outputs"], targets: Float[Tensor, "*models rows"]
    ) -> Float[Tensor, "*models rows"]:
        """Absolute errors."""
        return (self.predict(outputs) - targets).abs()

    def metrics(self) -> "MetricCollection":
        """Share of variance explained, mean absolute error, rank correlation."""
        from lora_ws.learn.metrics import regression_metrics

        return regression_metrics()


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Regression)}
