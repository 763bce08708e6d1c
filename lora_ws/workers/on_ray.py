"""The engine for more than one machine: tasks of a Ray cluster.

Whatever is kept is written where it is without Ray: by this process, or by a task into a folder
that all machines share. So the same command goes on after a kill, by this engine or another one.
"""

import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from lora_ws.errors import ConfigError, DataError
from lora_ws.workers.engine import AHEAD, PAUSE, Engine, R, T, failed, told

# What ends a task without an error of its own.
ENDED = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
# How often a task is begun whose process or machine ends.
TRIES = 3
# Variables that a cluster's processes get from this one; the Hub's token is a secret, and Ray shows
# them.
PASSED, SECRET = ("LORA_WS_", "HF_"), "HF_TOKEN"


@contextmanager
def connected(address: str | None) -> Iterator["Ray"]:
    """Be a driver of a cluster, or of the one that this process is a driver of already.

    Args:
        address: of the cluster; None starts one on this machine, which ends with this process.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield Ray()
        return
    # Ray would report its use to its makers, and let all other processes of a machine go first.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    passed = {k: v for k, v in os.environ.items() if k.startswith(PASSED) and k != SECRET}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address, runtime_env={"env_vars": passed}, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"address: expected that of a Ray cluster, such as auto or head:6379, got {address} "
            f"({why}); `ray start --head` starts one"
        ) from error
    try:
        yield Ray()
    finally:
        ray.shutdown()


class Ray(Engine):
    """Tasks of the cluster that this process is connected to, one CPU each."""

    def cpus(self) -> int:
        """Count the CPUs of the cluster."""
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def work_through(
        self,
        target: Callable[[T], None],
        tasks: Sequence[T],
        processes: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Engine.work_through`; a task whose process or machine ends is begun again."""
        start, running = _starter(target), dict[ObjectRef, tuple[T, int]]()
        todo = deque((task, TRIES) for task in tasks)
        try:
            while todo or running:
                while todo and len(running) < processes:
                    task, tries = todo.popleft()
                    running[start(task)] = task, tries - 1
                ready, _ = ray.wait(list(running), timeout=PAUSE)
                tick()
                for ref in ready:
                    task, tries = running.pop(ref)
                    try:
                        _result(ref)
                    except ENDED as error:
                        if not tries:
                            why = f"its process ended {TRIES} times ({told(error)})"
                            raise failed(why, processes) from error
                        todo.appendleft((task, tries))
                    except Exception as error:
                        raise failed(told(error), processes) from error
        finally:
            _cancel(running)

    def map_batches(
        self,
        call: Callable[[list[T]], list[R]],
        batches: Iterable[list[T]],
        processes: int,
        lost: Callable[[T], R],
    ) -> Iterator[list[R]]:
        """See `Engine.map_batches`; a batch whose process or machine ends is done item by item."""
        batches, start = iter(batches), _starter(call)
        waiting, running = deque[tuple[list[T], ObjectRef]](), list[ObjectRef]()
        try:
            while True:
                room = min(processes - len(running), AHEAD * processes - len(waiting))
                for batch in islice(batches, room):
                    running.append(start(batch))
                    waiting.append((batch, running[-1]))
                if not waiting:
                    return
                _, running = ray.wait(running)
                while waiting and waiting[0][1] not in running:
                    batch, ref = waiting.popleft()
                    try:
                        yield _result(ref)
                    except ENDED:
                        yield [_alone(start, item, lost) for item in batch]
        finally:
            _cancel(running)


def _starter(call: Callable[[T], Any]) -> Callable[[T], ObjectRef]:
    """Put a call, which may hold arrays, where every machine gets it once; start it on an item."""
    # As bytes, because what is in them may be importable from the working folder alone.
    folder, held = str(Path.cwd()), ray.put(pickle.dumps(call))
    return lambda item: _perform.remote(folder, held, pickle.dumps(item))


def _alone(start: Callable[[list[T]], ObjectRef], item: T, lost: Callable[[T], R]) -> R:
    try:
        return _result(start([item]))[0]
    except ENDED:
        return lost(item)


def _result(ref: ObjectRef) -> Any:
    """What a task returns; what it raises is raised as it was."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error


def _cancel(refs: Iterable[ObjectRef]) -> None:
    for ref in refs:
        ray.cancel(ref, force=True)


# Ray would begin a task for ever that takes too much memory.
@ray.remote(num_cpus=1, max_retries=0)
def _perform(folder: str, call: bytes, item: bytes) -> Any:
    """Do a task in another process, which for relative paths and imports is where this one is."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise DataError(
            f"{folder}: expected this folder on every machine of the cluster ({error.strerror}); "
            "work in a folder that they share"
        ) from error
    if folder not in sys.path:
        sys.path.append(folder)
    return pickle.loads(call)(pickle.loads(item))
