"""The engine of one machine: processes that end with the one that started them."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any

from lora_ws import system
from lora_ws.workers.engine import AHEAD, PAUSE, Engine, R, T, failed, told

TERMINATED = -signal.SIGTERM


class Local(Engine):
    """Processes of this machine; a single one is this process itself, which an item may end."""

    def cpus(self) -> int:
        """Count the CPUs that this process may use."""
        return system.cpus()

    def work_through(
        self,
        target: Callable[[T], None],
        tasks: Sequence[T],
        processes: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Engine.work_through`; by a single process an error comes out as it is."""
        if processes == 1:
            for task in tasks:
                target(task)
                tick()
            return
        context = multiprocessing.get_context("spawn")
        queue, errors = context.SimpleQueue(), context.SimpleQueue()
        count = min(processes, len(tasks))
        workers = [
            context.Process(target=_work, args=(target, queue, errors)) for _ in range(count)
        ]
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
                code = f"ended with code {worker.exitcode}"
                raise failed(code if errors.empty() else errors.get(), count)

    def map_batches(
        self,
        call: Callable[[list[T]], list[R]],
        batches: Iterable[list[T]],
        processes: int,
        lost: Callable[[T], R],
    ) -> Iterator[list[R]]:
        """See `Engine.map_batches`."""
        if processes == 1:
            yield from map(call, batches)
            return
        batches, waiting = iter(batches), deque[tuple[list[T], Future[list[R]]]]()
        pool = _pool(processes)
        try:
            while True:
                for batch in islice(batches, AHEAD * processes - len(waiting)):
                    waiting.append((batch, _submit(pool, call, batch)))
                if not waiting:
                    return
                batch, future = waiting.popleft()
                try:
                    yield future.result()
                except BrokenProcessPool:
                    pool.shutdown()
                    yield list(_one_by_one(call, batch, lost))
                    pool = _pool(processes)
                    waiting = deque((later, _submit(pool, call, later)) for later, _ in waiting)
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    processes = min(processes, system.MOST_PROCESSES)
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)


def _submit(
    pool: ProcessPoolExecutor, call: Callable[[list[T]], list[R]], batch: list[T]
) -> Future[list[R]]:
    try:
        return pool.submit(call, batch)
    except BrokenProcessPool as error:
        broken = Future[list[R]]()
        broken.set_exception(error)
        return broken


def _one_by_one(
    call: Callable[[list[T]], list[R]], batch: list[T], lost: Callable[[T], R]
) -> Iterator[R]:
    pool = _pool(1)
    for item in batch:
        try:
            yield pool.submit(call, [item]).result()[0]
        except BrokenProcessPool:
            pool.shutdown()
            pool = _pool(1)
            yield lost(item)
    pool.shutdown()


def _feed(queue: Any, tasks: Sequence[Any], count: int) -> None:
    """In a thread, because a pipe holds only so much."""
    for task in [*tasks, *[None] * count]:
        queue.put(task)


def _work(target: Callable[[Any], None], queue: Any, errors: Any) -> None:
    _begin()
    try:
        while (task := queue.get()) is not None:
            target(task)
    except Exception as error:
        errors.put(told(error))
        sys.exit(1)


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (one bar, of the parent)


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
