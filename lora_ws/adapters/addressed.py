"""Adapter files at addresses of fsspec, ``s3://bucket/file``, read in parts.

What a client of fsspec hands over is checked for its length, and that the file stayed as it was
announced. Its server is believed more than the Hub's: that bytes are of the range that was asked
for, fsspec does not tell.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn, final

from lora_ws import hub
from lora_ws.adapters.remote import PATIENCE, SILENCE, SLOWEST, WHOLE_BYTES, PartsSource
from lora_ws.adapters.source import Range
from lora_ws.addresses import file_system, within
from lora_ws.errors import AdapterError, NotAvailableError

# What file systems say of a file that changes with its content; some say several.
MARKS = (
    *("ETag", "etag", "VersionId", "version_id", "generation", "md5Hash", "content_md5"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created"),
)
# What asking again does not mend.
REFUSALS = (FileNotFoundError, PermissionError, IsADirectoryError, AdapterError, NotAvailableError)


@final
class FsspecSource(PartsSource):
    """A file at an address of fsspec.

    Its server is asked at the first use: the constructor only stores.

    Args:
        address: such as ``s3://bucket/folder/a.safetensors``.
        whole_below: files smaller than so many bytes are fetched whole, in one request.

    Example:
        >>> from lora_ws.addresses import file_system
        >>> file_system("memory://a.bin")[0].pipe("/a.bin", b"abcd")
        >>> source = FsspecSource("memory://a.bin")
        >>> source.read([(1, 3)]), source.size, source.bytes_read
        ([b'bc'], 4, 4)
    """

    def __init__(self, address: str, *, whole_below: int = WHOLE_BYTES) -> None:
        self.address = self.name = address
        self.whole_below = whole_below
        self.bytes_read = 0
        self._digest = hashlib.sha256()
        self._digested = 0

    @property
    def sha256(self) -> str | None:  # type: ignore[override]
        """Hash of the file's bytes, once all of them were read in their order."""
        return self._digest.hexdigest() if self._digested == self.size else None

    @property
    def identity(self) -> str:
        """Its address, and what its server says that changes with the content."""
        marks = {name: str(self._announced[name]) for name in MARKS if self._announced.get(name)}
        return json.dumps([self.name, self.size, marks]) if marks else ""

    def _size(self) -> int:
        return self._announced["size"]

    @cached_property
    def _announced(self) -> dict[str, Any]:
        """What the server says of the file.

        Raises:
            AdapterError: there is none (``missing``), or it is none (``not-a-file``).
            NotAvailableError: the server cannot be reached, or refuses.
        """
        found = self._ask()
        if found.get("type") != "file":
            kind = found.get("type") or "nothing"
            raise AdapterError(f"{self.name}: expected a file, got a {kind}", "not-a-file")
        if not isinstance(found.get("size"), int):
            self._wrong("the file's size", "none")
        return found

    def _ask(self) -> dict[str, Any]:
        system, path = file_system(self.address)
        try:
            return hub.insist(lambda: system.info(path, **within(system, SILENCE)), may_pass)
        except FileNotFoundError as error:
            raise AdapterError(f"{self.name}: no such file; check it", "missing") from error
        except PermissionError as error:
            raise NotAvailableError(
                f"{self.name}: cannot be read with your login ({error}); log in, or ask its owner"
            ) from error
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise NotAvailableError(
                f"{self.name}: cannot be reached ({why}); try again later"
            ) from error

    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        before = self.bytes_read
        found = super()._read(ranges)
        # A file that came in one answer is of one content.
        if self.bytes_read > before and len(self._start) < self.size:
            self._check_unchanged()
        return found

    def _fetch(self, start: int, stop: int) -> bytes:
        system, path = file_system(self.address)
        limit = within(system, PATIENCE + (stop - start) / SLOWEST)
        try:
            body: Any = hub.insist(
                lambda: system.cat_file(path, start=start, end=stop, **limit), may_pass
            )
        # Whatever an answer made of the client.
        except Exception as error:
            raise AdapterError(
                f"{self.name}: expected bytes {start} to {stop}, got none "
                f"({type(error).__name__}: {error}); try again later",
                reason="remote",
            ) from error
        self.bytes_read += len(body)
        if len(body) != stop - start:
            self._wrong(f"{stop - start} bytes", str(len(body)))
        if start <= self._digested < stop:
            self._digest.update(body[self._digested - start :])
            self._digested = stop
        return body

    def _check_unchanged(self) -> None:
        """Refuse a file that somebody writes: header and weights would be of several."""
        now = self._ask()
        if any(now.get(name) != self._announced.get(name) for name in ("size", *MARKS)):
            self._wrong("a file that stays as it is while it is read", "one that is being written")

    def _wrong(self, expected: str, got: str) -> NoReturn:
        raise AdapterError(
            f"{self.name}: expected of its server {expected}, got {got}; try again, or download "
            "the file and read it from disk",
            reason="remote",
        )


def may_pass(error: Exception) -> bool:
    """Whether asking again may mend a failure.

    Example:
        >>> may_pass(ConnectionError()), may_pass(FileNotFoundError())
        (True, False)
    """
    return not isinstance(error, REFUSALS)
