"""`MultiTask`: several questions to one network."""

from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.learn.tasks.base import Parts, Task, TaskHead
from lora_ws.learn.tasks.classification import Classification
from lora_ws.learn.tasks.multilabel import MultiLabel
from lora_ws.learn.tasks.regression import Regression
from lora_ws.report.metrics import ordered

if TYPE_CHECKING:
    from lora_ws.learn.metrics import Measured

NAMED: dict[str, type[Task]] = {t.name: t for t in (Classification, MultiLabel, Regression)}


@final
class MultiTask(Task):
    """Ask several questions of one network: a head for each column of the table, losses summed.

    Metrics are those of each task, as ``column.metric``, and the mean over tasks of the metric that
    selects. The first task is the verdict of a bundle, whose abstention goes for all.

    Args:
        tasks: what is predicted for each column: classification, multilabel, regression, or a task.

    Attributes:
        heads_: the tasks, fitted, and their columns of outputs and targets.

    Example:
        >>> task = MultiTask(tasks={"kind": "classification", "size": "regression"})
        >>> task.fit(np.array([[0, 4], [1, 8]], np.float32), (("cat", "dog"), ())).outputs
        3
    """

    name = "multitask"
    selects = "mean_over_tasks"

    def __init__(self, *, tasks: dict[str, Task | str] | None = None) -> None:
        self.tasks = tasks

    def _tasks(self) -> dict[str, Task]:
        """The tasks by column.

        Raises:
            ConfigError: there is none, or one that is not of classes, labels or numbers.
        """
        if not self.tasks:
            raise ConfigError(
                "task.tasks: expected a task for each column, such as {category_label: "
                "classification, num_images: regression}, got none"
            )
        found = {}
        for column, task in self.tasks.items():
            task = NAMED[task]() if isinstance(task, str) and task in NAMED else task
            # A task that puts something on top of the network cannot share it.
            if isinstance(task, str) or not task.target or type(task).network is not Task.network:
                got = task if isinstance(task, str) else task.name
                raise ConfigError(
                    f"task.tasks.{column}: expected one of {', '.join(NAMED)}, got {got}"
                )
            found[column] = task
        return found

    @property
    def _first(self) -> Task:
        return next(iter(self._tasks().values()))

    @property
    def quality(self) -> str:  # type: ignore[override]
        """That of the first task."""
        return self._first.quality

    @property
    def gives_probabilities(self) -> bool:  # type: ignore[override]
        """Whether the first task does."""
        return self._first.gives_probabilities

    def read(
        self, adapters: AdapterSet, label: str | None
    ) -> tuple[Float[np.ndarray, "adapters columns"], tuple[tuple[str, ...], ...]]:
        """Read the targets of all tasks, side by side, and the names of each.

        Raises:
            ConfigError: a label is given beside the columns, or a task does not fit.
        """
        if label is not None:
            raise ConfigError(
                f"label: expected none with task={self.name}, whose `tasks` name the columns, got "
                f"{label}; add it to them"
            )
        found = [task.read(adapters, column) for column, task in self._tasks().items()]
        columns = [targets.reshape(len(targets), -1) for targets, _ in found]
        return np.concatenate(columns, axis=1).astype(np.float32), tuple(n for _, n in found)

    def check(
        self,
        name: str,
        targets: Float[np.ndarray, "rows columns"],
        classes: tuple[tuple[str, ...], ...],
        least: int,
    ) -> None:
        """Refuse rows that cannot serve one of the tasks."""
        for head, names in zip(self._place(classes), classes, strict=True):
            head.task.check(f"{name}, {head.name}", head.own(targets), names, least)

    def learn(
        self, targets: Float[np.ndarray, "rows columns"], classes: tuple[tuple[str, ...], ...]
    ) -> None:
        """Fit each task."""
        self.heads_ = tuple(
            head._replace(task=head.task.fit(head.own(targets), names))
            for head, names in zip(self._place(classes), classes, strict=True)
        )

    def _place(self, classes: tuple[tuple[str, ...], ...]) -> list[TaskHead]:
        """The columns of each task: an output for each name, or one of a number."""
        heads, output, target = [], 0, 0
        for (column, task), names in zip(self._tasks().items(), classes, strict=True):
            outputs = slice(output, output + (len(names) or 1))
            targets = slice(target, target + (len(names) if task.target == "labels" else 1))
            heads.append(TaskHead(column, task, outputs, targets))
            output, target = outputs.stop, targets.stop
        return heads

    @property
    def heads(self) -> tuple[TaskHead, ...]:
        """The tasks and their columns."""
        return self.heads_

    @property
    def outputs(self) -> int:
        """Those of all tasks."""
        return self.heads_[-1].outputs.stop

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the first task."""
        return self.heads_[0].task.classes

    @property
    def state(self) -> object:
        """What each task knows."""
        return [(head.name, head.task.state) for head in self.heads_]

    def loss(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Float[Tensor, "*models rows columns"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """The sum over tasks."""
        losses = [
            head.task.loss(outputs[..., head.outputs], head.own(targets), reduction)
            for head in self.heads_
        ]
        return torch.stack(losses).sum(0)

    def predict(
        self, outputs: Float[Tensor, "*models rows outputs"]
    ) -> Float[Tensor, "*models rows outputs"]:
        """Probabilities and numbers, in the columns of the outputs."""
        found = [head.task.predict(outputs[..., head.outputs]) for head in self.heads_]
        return torch.cat([x if x.ndim == outputs.ndim else x[..., None] for x in found], dim=-1)

    def score(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Float[Tensor, "*models rows columns"],
    ) -> Shaped[Tensor, "*models rows"]:
        """Those of the first task."""
        head = self.heads_[0]
        return head.task.score(outputs[..., head.outputs], head.own(targets))

    def measure(self, parts: Parts, part: str) -> "Measured":
        """The metrics of each task; confusion and predictions of the first."""
        from lora_ws.learn.metrics import Measured

        values, measured = {}, []
        for head in self.heads_:
            found = head.task.measure(head.parts(parts), part)
            values |= {f"{head.name}.{key}": found.values[key] for key in ordered(found.values)}
            measured.append(found)
        chosen = [f.values[h.task.selects] for f, h in zip(measured, self.heads_, strict=True)]
        first = measured[0]
        values = {self.selects: float(np.mean(chosen)), **values}
        return Measured(values, first.confusion, first.scores, first.truth)
