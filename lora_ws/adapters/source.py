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

    Example:
        >>> source = LocalSource(__file__)
        >>> source.read([(0, 3)]), source.moved
        ([b'\"\"\"'], 3)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
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
        try:
            with self.path.open("rb") as file:
                parts = []
                for start, stop in ranges:
                    file.seek(start)
                    parts.append(file.read(stop - start))
        except OSError as error:
            raise AdapterError(
                f"{self.name}: cannot be read ({error}); check its permissions",
                reason="unreadable",
            ) from error
        self.moved += sum(map(len, parts))
        for part, (start, stop) in zip(parts, ranges, strict=True):
            if len(part) != stop - start:
                raise AdapterError(
                    f"{self.name}: expected {stop - start} bytes at {start}, got {len(part)}; the "
                    "file became shorter while it was read",
                    reason="truncated",
                )
        return parts


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
