"""Where the bytes of an adapter file come from: `Source`, and files on this machine.

A source hands out byte ranges and nothing else; `header` and `tensors` check what they mean.
"""

import hashlib
import os
import stat
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Self, final

from lora_ws.errors import AdapterError

# Start, and end (exclusive), counted from the start of the file.
Range = tuple[int, int]
# Two ranges on disk with at most so many bytes between them are one read; of at most so many bytes.
GAP_BYTES, REQUEST_BYTES = 1 << 13, 1 << 24


class Source(ABC):
    """A file of known size, read in ranges; `close`, or a ``with``, lets go of it.

    Attributes:
        name: what errors call it.
        bytes_read: so far, needed or not; those hashed on this machine are not counted.
    """

    name: str
    bytes_read: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Let go of what is held open; nothing can be read afterwards."""

    @property
    def revision(self) -> str:
        """Commit on the Hub, or empty."""
        return ""

    @property
    def identity(self) -> str:
        """What tells its content from others: a hash, or a name that stays; empty without one."""
        return self.sha256 or (self.revision and f"{self.name}@{self.revision}")

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the file's bytes; None where its holder does not say."""
        return self._sha256()

    def _sha256(self) -> str | None:
        """As `sha256`, asked for once."""
        return None

    @cached_property
    def size(self) -> int:
        """Bytes of the whole file, as its holder reports.

        Raises:
            AdapterError: there is no such file.
        """
        return self._size()

    @abstractmethod
    def _size(self) -> int:
        """As `size`, asked for once."""

    @abstractmethod
    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        """As `read`, for ranges that are known to lie within the file."""

    @final
    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Read ranges of the file.

        Args:
            ranges: start and end (exclusive) in bytes, in any order; they may overlap.

        Returns:
            One ``bytes`` per range, each of exactly the length asked for.

        Raises:
            AdapterError: a range reaches beyond the file, or the bytes do not come.
        """
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.size:
                raise AdapterError(
                    f"{self.name}: expected bytes {start} to {stop}, got a file of {self.size} "
                    "bytes; the download may be incomplete",
                    reason="truncated",
                )
        return self._read(ranges)


@final
class LocalSource(Source):
    """A file on this machine, opened once: all that is read and hashed is of one file.

    Args:
        path: the file.
        name: what messages call it; None for its path.

    Example:
        >>> source = LocalSource(__file__)
        >>> source.read([(0, 3)]), source.bytes_read
        ([b'\"\"\"'], 3)
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = str(path) if name is None else name
        self.bytes_read = 0

    def close(self) -> None:
        """Close the file, if it was opened."""
        if "_opened" in vars(self):
            self._opened[0].close()

    @cached_property
    def _opened(self) -> tuple[BufferedReader, os.stat_result]:
        """The file, and what the system says of it."""
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"{self.name}: expected a file, got none ({error}); check the path",
                reason="missing",
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise not_a_file(self.name, status.st_mode)
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise self._unreadable(error) from error
        # For those who do not close: an open file that is collected would warn.
        weakref.finalize(self, file.close)
        return file, os.fstat(file.fileno())

    def _size(self) -> int:
        return self._opened[1].st_size

    def _sha256(self) -> str:
        file, _ = self._opened
        try:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(error) from error
        self._check_unchanged()
        return digest

    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        # Not mapped into memory: a file that another process shortens would end this one.
        bodies: list[tuple[int, int, bytes]] = []
        file, _ = self._opened
        try:
            for start, stop in merge_ranges(ranges, GAP_BYTES):
                file.seek(start)
                bodies.append((start, stop, file.read(stop - start)))
        except OSError as error:
            raise self._unreadable(error) from error
        found: dict[Range, bytes] = {}
        spans, at = sorted(set(ranges)), 0
        for start, stop, body in bodies:
            self.bytes_read += len(body)
            if len(body) != stop - start:
                raise self._changed()
            while at < len(spans) and spans[at][1] <= stop:
                found[spans[at]] = body[spans[at][0] - start : spans[at][1] - start]
                at += 1
        self._check_unchanged()
        return [found[span] for span in ranges]

    def _unreadable(self, error: OSError) -> AdapterError:
        message = f"{self.name}: cannot be read ({error}); check its permissions"
        return AdapterError(message, reason="unreadable")

    def _check_unchanged(self) -> None:
        """Refuse a file that somebody writes: header, weights and hash would be of several."""
        file, was = self._opened
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
            raise self._changed()

    def _changed(self) -> AdapterError:
        return AdapterError(
            f"{self.name}: expected a file that stays as it is while it is read, got one that is "
            "being written; read it again when that is done",
            reason="unreadable",
        )


def not_a_file(name: str, mode: int) -> AdapterError:
    """The error about no regular file: opening a pipe would wait for its other end for ever.

    Args:
        name: what the error calls it.
        mode: what the system says of it.

    Example:
        >>> not_a_file("a", stat.S_IFIFO)
        AdapterError('a: expected a file, got a pipe; name a file')
    """
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    return AdapterError(f"{name}: expected a file, got a {kind}; name a file", "not-a-file")


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def tensor_sha256(file: Path) -> str:
    """Hash of a safetensors file's numbers, without its header.

    It stays the same when somebody edits the header. Model managers call its first 12 digits
    AutoV3; kohya's trainer writes it into the header as ``sshs_model_hash``.
    """
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        return hashlib.file_digest(opened, "sha256").hexdigest()


def merge_ranges(ranges: Sequence[Range], gap: int, most: int = REQUEST_BYTES) -> list[Range]:
    """Join ranges that overlap or lie close to each other.

    Args:
        ranges: start and end (exclusive), in any order.
        gap: most bytes between two that become one.
        most: bytes above which nothing more is joined.

    Returns:
        Sorted ranges, each of the given ones within one of them.

    Example:
        >>> merge_ranges([(90, 100), (0, 10), (15, 20)], gap=5)
        [(0, 20), (90, 100)]
    """
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        near = joined and start - joined[-1][1] <= gap
        if near and max(joined[-1][1], stop) - joined[-1][0] <= most:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined
