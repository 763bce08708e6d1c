"""`Task`: the seam for what is predicted for an adapter. All that depends on labels."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from lora_ws.collection import AdapterSet, Split
from lora_ws.models import InputSpec, MetanetModule, Metanetwork
from lora_ws.parameters import Parametrized

if TYPE_CHECKING:
    from lora_ws.learn.metrics import Measured

T = TypeVar("T", np.ndarray, Tensor)
# Predictions and targets of a part, by its name: train, val or test.
Parts = Callable[[str], tuple[Tensor, Tensor]]


class Task(Parametrized, ABC):
    """One kind of label: outputs, loss, predictions and metrics.

    A task is a spec: its constructor is keyword-only and only stores. ``fit`` returns a copy that
    knows the training targets, in attributes ending in ``_``.

    Attributes:
        name: as specs and records have it.
        quality: what curves show beside the loss, as a key.
        selects: metric on the validation rows by which the best of several experiments is chosen;
            higher is better.
        target: what the target of a row is: the number of its class, 0 or 1 for each of several
            labels, or a number, which outputs give in ``std_`` from ``mean_``; empty for others.
        needs_label: what kind of column a label has to name; empty where the card's own will do.
        gives_probabilities: whether predictions are probabilities of named classes or labels, so
            that they can be calibrated and a bundle can hold the network.
        takes_classifiers: whether a classifier of scikit-learn can stand for the network.
        by_row: whether the loss of a row depends on that row alone.
        takes_regressors: whether a regressor can, by least squares on ``numbers``.
        stratifies: whether parts are to hold the label's values alike; else the card's classes.

    Example:
        >>> from lora_ws.learn.tasks import TASKS
        >>> [(name, task.selects) for name, task in TASKS.items()][:2]
        [('classification', 'auroc'), ('multilabel', 'average_precision')]
    """

    name: ClassVar[str]
    quality: ClassVar[str]
    selects: ClassVar[str]
    target: ClassVar[Literal["class", "labels", "number", ""]] = ""
    needs_label: str = ""
    gives_probabilities: ClassVar[bool] = False
    takes_classifiers: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    takes_regressors: ClassVar[bool] = False
    stratifies: ClassVar[bool] = False

    @abstractmethod
    def read(
        self, adapters: AdapterSet, label: str | None
    ) -> tuple[Shaped[np.ndarray, "..."], tuple[Any, ...]]:
        """Read a target per adapter, and the names of classes if there are any.

        Of several tasks, the names of each.
        """

    def check(
        self,
        name: str,
        targets: Shaped[np.ndarray, "..."],
        classes: tuple[Any, ...],
        least: int,
    ) -> None:
        """Refuse rows that cannot serve this task; all can unless a task says otherwise.

        Args:
            name: of the collection or part, for the error.
            targets: of the rows ``[rows, ...]``.
            classes: names of the classes.
            least: how many rows each class needs.
        """
        _ = name, targets, classes, least

    def assign(
        self, parts: Split, targets: Shaped[np.ndarray, "..."], classes: tuple[Any, ...]
    ) -> Split:
        """Say which rows are which part; those of the collection's split unless a task differs."""
        _ = targets, classes
        return parts

    def fit(self, targets: Shaped[np.ndarray, "..."], classes: tuple[Any, ...] = ()) -> Self:
        """Learn from the training targets what outputs mean; returns a fitted copy."""
        fitted = copy(self)
        fitted.learn(targets, classes)
        return fitted

    @abstractmethod
    def learn(self, targets: Shaped[np.ndarray, "..."], classes: tuple[Any, ...]) -> None:
        """Set the fitted attributes."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many outputs a network has."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or labels; none where there are no names."""
        return ()

    @property
    def heads(self) -> tuple["TaskHead", ...]:
        """The tasks that this one is made of; none where it is one."""
        return ()

    @property
    def state(self) -> object:
        """What tasks that train in one stack have in common."""
        return self.name, vars(self)

    def network(self, model: Metanetwork) -> Metanetwork:
        """The network that answers: the model, unless a task puts something on top of it."""
        return model

    def build(self, model: Metanetwork, inputs: InputSpec) -> MetanetModule:
        """Make the network; torch's generator draws its initial weights."""
        return self.network(model).build(inputs, self.outputs)

    @abstractmethod
    def loss(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Shaped[Tensor, "..."],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Sum of the loss over all rows, or the loss of each."""

    @abstractmethod
    def predict(self, outputs: Float[Tensor, "*models rows outputs"]) -> Float[Tensor, "..."]:
        """Turn outputs into probabilities, numbers or embeddings."""

    @abstractmethod
    def score(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Shaped[Tensor, "..."],
    ) -> Shaped[Tensor, "*models rows"]:
        """What ``quality`` is the mean of."""

    @abstractmethod
    def measure(self, parts: Parts, part: str) -> "Measured":
        """Measure the predictions of a part; they do not ask other processes.

        Args:
            parts: gives predictions and targets of any part: what is tuned is tuned on ``val``,
                what is looked up is looked up in ``train``.
            part: which is measured.
        """

    def members(self, targets: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray, "rows classes"]:
        """Which classes or labels each row has; asked of tasks that give probabilities alone."""
        raise NotImplementedError(f"{self.name} names no classes")

    def numbers(self, targets: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "rows outputs"]:
        """What least squares fits outputs to: 1 where a class or label is the row's, else -1."""
        return 2.0 * self.members(targets) - 1.0

    def thresholds(
        self,
        probabilities: Float[np.ndarray, "rows classes"],
        targets: Shaped[np.ndarray, "..."],
    ) -> tuple[float, ...]:
        """The probability of each label from which on it applies; none of exclusive classes."""
        _ = probabilities, targets
        return ()


class TaskHead(NamedTuple):
    """One of several tasks of a network.

    Attributes:
        name: column of the table with its labels.
        task: what is asked.
        outputs: its columns of the outputs, and of predictions.
        targets: its columns of the targets.
    """

    name: str
    task: Task
    outputs: slice
    targets: slice

    def own(self, targets: T) -> T:
        """Targets as the task knows them, out of those of all tasks ``[..., columns]``."""
        found = targets[..., self.targets]
        if self.task.target == "labels":
            return found
        found = found[..., 0]
        if self.task.target == "number":
            return found
        return found.long() if isinstance(found, Tensor) else found.astype(np.int64)

    def parts(self, parts: Parts) -> Parts:
        """Predictions and targets of this task alone."""

        def of(part: str) -> tuple[Tensor, Tensor]:
            scores, truth = parts(part)
            scores = scores[..., self.outputs]
            return scores[..., 0] if self.task.target == "number" else scores, self.own(truth)

        return of


class NamedTask(Task):
    """A task with a logit for each name: of classes, or of labels.

    Attributes:
        classes_: the names.
    """

    gives_probabilities = True

    def learn(self, targets: Shaped[np.ndarray, "..."], classes: tuple[str, ...]) -> None:
        """Take the names."""
        _ = targets
        self.classes_ = classes

    @property
    def outputs(self) -> int:
        """A logit per name."""
        return len(self.classes_)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names, in the order of the outputs."""
        return self.classes_
