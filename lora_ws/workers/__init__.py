"""Tasks that processes do: of this machine, or of a cluster. `on_engine` says whose."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from lora_ws.errors import ConfigError
from lora_ws.workers.engine import Engine

_CHOSEN: ContextVar[Engine | None] = ContextVar("engine", default=None)
_PROCESSES: ContextVar[int | None] = ContextVar("processes", default=None)


def current_engine() -> Engine:
    """What does the tasks: processes of this machine, unless `on_engine` says otherwise.

    Example:
        >>> list(current_engine().map_batches(sorted, [[3, 1], [2]], processes=1, lost=int))
        [[1, 3], [2]]
    """
    from lora_ws.workers.local import Local

    return _CHOSEN.get() or Local()


@contextmanager
def on_engine(
    engine: Literal["local", "ray"] = "local", address: str | None = None
) -> Iterator[None]:
    """Choose what does the tasks.

    Args:
        engine: what starts the processes: local, this machine alone, or ray, a Ray cluster.
        address: of a Ray cluster that runs, such as auto or head:6379; null starts one on this
            machine.

    Raises:
        ConfigError: there is no cluster at the address.

    Example:
        >>> with on_engine("local"):
        ...     type(current_engine()).__name__
        'Local'
    """
    if engine == "local":
        if address is not None:
            raise ConfigError(
                f"address: expected engine=ray beside it, got engine=local, {address}"
            )
        yield
        return
    from lora_ws.workers.on_ray import connected

    with connected(address) as ray:
        before = _CHOSEN.set(ray)
        try:
            yield
        finally:
            _CHOSEN.reset(before)


@contextmanager
def in_processes(processes: int | None = None) -> Iterator[None]:
    """Choose how many seeds are trained at once.

    Args:
        processes: processes that train seeds, side by side; null takes one, or on a Ray cluster one
            per CPU.

    Raises:
        ConfigError: fewer than one.

    Example:
        >>> with in_processes(2):
        ...     processes_asked()
        2
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"processes: expected at least 1, got {processes}")
    before = _PROCESSES.set(processes)
    try:
        yield
    finally:
        _PROCESSES.reset(before)


def processes_asked() -> int:
    """How many processes train; 0 where this one alone does."""
    asked, elsewhere = _PROCESSES.get(), _CHOSEN.get() is not None
    if elsewhere:
        return asked or current_engine().cpus()
    return asked if asked and asked > 1 else 0
