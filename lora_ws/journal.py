"""Journals: files of one JSON object per line that survive a kill, and the locks of their writers.

A line counts once its newline is on disk. A kill leaves at most one half line, at the end: readers
stop before it, and the next writer cuts it off.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from lora_ws.errors import DataError

# Read at once, from the end, to find where the last whole line ends.
BLOCK = 1 << 16


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> list[int]:
    """Add one line per record; after this returns, a kill cannot lose them.

    Args:
        path: of the journal, begun if missing. Several writers keep a `locked` block each.
        records: plain data.

    Returns:
        where each line starts, in bytes.
    """
    starts, block = [], b""
    for record in records:
        starts.append(len(block))
        block += json.dumps(record, allow_nan=False).encode() + b"\n"
    with path.open("a+b") as file:
        end = file.truncate(_end(file))
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return [end + start for start in starts]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file as a whole: to another name first, which takes its place once the block ends.

    Args:
        path: of a file, new or not; what is no file, such as a pipe, is written to directly.

    Yields:
        Where to write.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    # A link goes on pointing to its file.
    whole = path.resolve()
    partial = whole.with_name(f"{whole.name}.partial")
    try:
        yield partial
        partial.replace(whole)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> list[Any]:
    """Parse the whole lines of a journal; a missing file has none.

    Raises:
        DataError: a line is damaged.
    """
    found = []
    for start, line in lines(path):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}: expected a line of JSON at byte {start}, got a damaged one ({error}); "
                "restore the file, or remove it and start anew"
            ) from error
    return found


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the start, in bytes, and the content of each whole line; another process may write."""
    if not path.is_file():
        return
    start = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield start, line
            start += len(line)


def mend(path: Path) -> None:
    """Cut off the half line that a kill left, in place, so that a kill meanwhile loses nothing."""
    with path.open("a+b") as file:
        file.truncate(_end(file))


def _end(file: BinaryIO) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


@contextmanager
def locked(path: Path, busy: str = "", *, remove: bool = False) -> Iterator[None]:
    """Hold a file lock: one process at a time is in such a block.

    Args:
        path: of the lock file.
        busy: the error where another process holds it; without one, wait for that process.
        remove: whether the lock file goes at the end.

    Raises:
        DataError: another process holds it, and ``busy`` is given.
    """
    lock = FileLock(path, timeout=0 if busy else -1)
    try:
        lock.acquire()
    except Timeout as error:
        raise DataError(busy) from error
    try:
        yield
    finally:
        if remove:
            # While it is held: afterwards it may be another process's. Windows refuses this, but
            # removes the file on release.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
        lock.release()
