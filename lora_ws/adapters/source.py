"""Where the bytes of an adapter file come from: `Source`, and files on this machine.

A source hands out byte ranges and nothing else; `header` and `tensors` check what they mean.
"""

import hashlib
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import final

from lora_ws.errors import AdapterError

# Start, and end (exclusive), counted from the start of the file.
Range = tuple[int, int]
# Two ranges on disk with at most so many bytes between them are one read; of at most so many bytes.
GAP_BYTES, REQUEST_BYTES = 1 << 13, 1 << 24


class Source(ABC):
    """A file of known size, read in ranges.

    Attributes:
        name: what errors call it.
        moved: bytes read so far, needed or not.
    """

    name: str
    moved: int

    @property
    def revision(self) -> str:
        """Commit on the Hub, or empty."""
        return ""

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the file's bytes; None where its holder does not say."""
        return self._sha256()

    def _sha256(self) -> str | None:
        """As `sha256`, asked for once."""
        return None

    @cached_property
    def size(self) -> int:
        """Bytes of the whole file, as whoever holds it says.

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
            One ``bytes`` a range, each of exactly the length asked for.

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
    """A file on this machine.

    Args:
        path: the file.
        name: what messages call it; None for its path.

    Example:
        >>> source = LocalSource(__file__)
        >>> source.read([(0, 3)]), source.moved
        ([b'\"\"\"'], 3)
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = str(path) if name is None else name
        self.moved = 0

    def _sha256(self) -> str:
        return file_sha256(self.path)

    def _size(self) -> int:
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"{self.name}: expected a file, got none ({error}); check the path",
                reason="missing",
            ) from error
        # Opening a pipe would wait for its other end for ever.
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(
                f"{self.name}: expected a file, got a folder, pipe or device; name a file",
                reason="missing",
            )
        return status.st_size

    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        # Not mapped into memory: a file that another process shortens would end this one.
        bodies: list[tuple[int, int, bytes]] = []
        try:
            with self.path.open("rb") as file:
                for start, stop in merge(ranges, GAP_BYTES):
                    file.seek(start)
                    bodies.append((start, stop, file.read(stop - start)))
        except OSError as error:
            raise AdapterError(
                f"{self.name}: cannot be read ({error}); check its permissions",
                reason="unreadable",
            ) from error
        found: dict[Range, bytes] = {}
        spans, at = sorted(set(ranges)), 0
        for start, stop, body in bodies:
            self.moved += len(body)
            if len(body) != stop - start:
                raise AdapterError(
                    f"{self.name}: expected {stop - start} bytes at {start}, got {len(body)}; the "
                    "file became shorter while it was read",
                    reason="truncated",
                )
            while at < len(spans) and spans[at][1] <= stop:
                found[spans[at]] = body[spans[at][0] - start : spans[at][1] - start]
                at += 1
        return [found[span] for span in ranges]


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def merge(ranges: Sequence[Range], gap: int, most: int = REQUEST_BYTES) -> list[Range]:
    """Join ranges that overlap or lie close to each other.

    Args:
        ranges: start and end (exclusive), in any order.
        gap: most bytes between two that become one.
        most: bytes above which nothing more is joined.

    Returns:
        Sorted ranges, each of the given ones within one of them.

    Example:
        >>> merge([(90, 100), (0, 10), (15, 20)], gap=5)
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
