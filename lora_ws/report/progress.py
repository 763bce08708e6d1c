"""A progress bar on a terminal, silence elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(
    title: str, total: int | None, done: int = 0, *, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """Show how far a long piece of work is, unless another process does.

    Yields:
        ``advance(steps=1, title=None)``: count steps, and say what is being done.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (shown and sys.stderr.isatty()),
    )
    with bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance(steps: int = 1, title: str | None = None) -> None:
            bar.update(task, advance=steps, description=title)

        yield advance
