"""Tasks: what is predicted for an adapter, one kind of label per file.

A new task is a file with a subclass of `Task` and its line in `TASKS`; training, both engines,
records, tables and the choice of the best run ask the task and nothing else.
"""

from lora_ws.learn.tasks.base import Parts, Task
from lora_ws.learn.tasks.classification import Classification
from lora_ws.learn.tasks.embedding import Embedding
from lora_ws.learn.tasks.multilabel import MultiLabel
from lora_ws.learn.tasks.multitask import MultiTask
from lora_ws.learn.tasks.regression import Regression
from lora_ws.learn.tasks.zero_shot import ZeroShot

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classification, MultiLabel, Regression, Embedding, ZeroShot, MultiTask)
}


def task_of(task: Task | str) -> Task:
    """The task of a name or class, with its defaults; a task is itself.

    Raises:
        KeyError: there is no such name.

    Example:
        >>> task_of("regression").selects
        'r2'
    """
    return TASKS[task]() if isinstance(task, str) else task


__all__ = [
    "TASKS",
    "Classification",
    "Embedding",
    "MultiLabel",
    "MultiTask",
    "Parts",
    "Regression",
    "Task",
    "ZeroShot",
    "task_of",
]
