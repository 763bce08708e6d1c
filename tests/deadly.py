"""Tasks for processes, which some of them end; few imports, as each new process repeats them."""

import os
import signal
from pathlib import Path


def double(items: list[int], deadly: int = -1) -> list[int]:
    if deadly in items:
        os.kill(os.getpid(), signal.SIGKILL)
    return [2 * item for item in items]


def touch(file: Path) -> None:
    """The first process that does it is killed midway."""
    begun = file.with_suffix(".begun")
    if not begun.exists():
        begun.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    file.touch()


def refuse(task: int) -> None:
    if task == 3:
        raise ValueError("no 3")
