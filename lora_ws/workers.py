"""Tasks in processes of their own, which end with the one that started them."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from lora_ws.errors import LoraWsError, TrainingError

T = TypeVar("T")
# Seconds between looks at the processes.
PAUSE = 0.2
TERMINATED = -15


def work_through(
    target: Callable[[T], None],
    tasks: Sequence[T],
    processes: int,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Do tasks side by side, each by one of several processes, until all are done or one fails.

    Args:
        target: what is done with a task; a function of a module, as processes are spawned.
        tasks: in the order in which they are begun; picklable.
        processes: how many work at once.
        tick: called several times a second, to show how far things are.

    Raises:
        TrainingError: a task failed; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    queue, errors = context.SimpleQueue(), context.SimpleQueue()
    count = min(processes, len(tasks))
    workers = [context.Process(target=_work, args=(target, queue, errors)) for _ in range(count)]
    for worker in workers:
        worker.start()
    feeder = threading.Thread(target=_feed, args=(queue, tasks, count), daemon=True)
    feeder.start()
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(PAUSE)
            tick()
            if any(worker.exitcode for worker in workers):
                break
    finally:
        _stop(workers)
    for worker in workers:
        # One that was stopped because another failed is not the reason.
        if worker.exitcode and worker.exitcode != TERMINATED:
            why = errors.get() if not errors.empty() else f"ended with code {worker.exitcode}"
            raise TrainingError(f"a process of {count} failed: {why}")


def _feed(queue: Any, tasks: Sequence[Any], count: int) -> None:
    """In a thread, because a pipe holds only so much."""
    for task in [*tasks, *[None] * count]:
        queue.put(task)


def _work(target: Callable[[Any], None], queue: Any, errors: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 (one bar, of the parent)
    try:
        while (task := queue.get()) is not None:
            target(task)
    except Exception as error:
        kind = "" if isinstance(error, LoraWsError) else f"{type(error).__name__}: "
        errors.put(f"{kind}{error}")
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _stop(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
    for worker in workers:
        worker.join()
