"""Adapter files on the Hugging Face Hub, read in parts.

The header of a file of gigabytes is a few thousand bytes, and so are the layers that one wants.
No answer is believed: each must be the very range that was asked for, of a file of the size that
was announced, and of exactly that length, because a server or proxy that ignores ranges would
otherwise hand over other numbers without an error.
"""

import hashlib
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, final
from urllib.parse import urljoin, urlsplit

from lora_ws import hub
from lora_ws.adapters.header import shown
from lora_ws.adapters.source import REQUEST_BYTES, Range, Source, merge_ranges
from lora_ws.errors import AdapterError, NotAvailableError

# Below, one request for everything is quicker than several for parts.
WHOLE_BYTES = 5_000_000
# What is fetched first: nearly every header, in one request.
HEAD_BYTES = 1 << 17
# Two ranges with at most so many bytes between them are one request.
GAP_BYTES = 1 << 16
# Addresses to follow for one request, counting a signed one that ran out.
HOPS = 6
# Seconds without a byte; and for a whole answer, together with the slowest bytes per second.
SILENCE, PATIENCE, SLOWEST = 30.0, 60.0, 100_000
REDIRECTS = (301, 302, 303, 307, 308)
REFUSALS = (401, 403)
SAFETENSORS = ".safetensors"


class HubFile(NamedTuple):
    """A file of a model repository, as of a commit."""

    repo_id: str
    filename: str
    size: int
    revision: str


class PartsSource(Source):
    """A file elsewhere, whose start is kept, and of which close ranges are one request.

    Attributes:
        whole_below: files smaller than so many bytes are fetched whole, in one request.
    """

    whole_below: int
    _start: bytes = b""

    @abstractmethod
    def _fetch(self, start: int, stop: int) -> bytes:
        """One range, of exactly its length."""

    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        first = self.size if self.size < self.whole_below else min(HEAD_BYTES, self.size)
        if not self._start and any(start < first and start < stop for start, stop in ranges):
            self._start = self._fetch(0, first)
        found = {span: self._part(span) for span in set(ranges) if span[1] <= len(self._start)}
        rest = sorted(span for span in set(ranges) if span not in found)
        at = 0
        for start, stop in merge_ranges(rest, GAP_BYTES):
            steps = range(start, stop, REQUEST_BYTES)
            body = b"".join(self._fetch(step, min(step + REQUEST_BYTES, stop)) for step in steps)
            while at < len(rest) and rest[at][1] <= stop:
                found[rest[at]] = body[rest[at][0] - start : rest[at][1] - start]
                at += 1
        return [found[span] for span in ranges]

    def _part(self, span: Range) -> bytes:
        return self._start[slice(*span)]


@final
class HubSource(PartsSource):
    """A file of a model repository on the Hub, at one commit.

    The Hub is asked at the first use: the constructor only stores.

    Args:
        repo_id: ``owner/name`` of a model repository.
        filename: path of the file in it.
        revision: branch, tag or commit; None for the default branch.
        whole_below: files smaller than so many bytes are fetched whole, in one request.
        name: what messages call it; None for repository and path.

    Example:
        >>> source = HubSource("owner/name", "pytorch_lora_weights.safetensors")
        >>> source.name, source.bytes_read
        ('owner/name/pytorch_lora_weights.safetensors', 0)
    """

    def __init__(
        self,
        repo_id: str,
        filename: str,
        revision: str | None = None,
        *,
        whole_below: int = WHOLE_BYTES,
        name: str | None = None,
    ) -> None:
        self.repo_id = repo_id
        self.filename = filename
        self.asked_revision = revision
        self.whole_below = whole_below
        self.name = name or f"{shown(repo_id)}/{shown(filename)}".replace("`", "")
        self.bytes_read = 0
        self._address = ""

    @property
    def revision(self) -> str:
        """The commit that all bytes are of.

        Raises:
            AdapterError: the repository holds no such file (``missing``).
            NotAvailableError: the Hub cannot be reached, or has no such repository or revision.
        """
        return self._announced.commit

    def _sha256(self) -> str | None:
        # Of a file that is not LFS the Hub announces none.
        return self._announced.sha256

    @cached_property
    def _announced(self) -> "_Announced":
        from huggingface_hub.errors import EntryNotFoundError

        api = hub.client()
        try:
            url = _url(self.repo_id, self.filename, self.asked_revision)
            answer = hub.insist(
                lambda: api.get_hf_file_metadata(url=url, timeout=SILENCE), hub.is_passing
            )
        except EntryNotFoundError as error:
            raise AdapterError(
                f"{self.name}: the repository holds no such file; list_adapters names what it "
                "holds",
                reason="missing",
            ) from error
        except Exception as error:
            why = hub.no_answer(error, self.repo_id, self.asked_revision)
            raise NotAvailableError(f"{self.name}: {why}; try again later") from error
        if not answer.commit_hash or answer.size is None:
            self._wrong("the file's commit and size", "neither")
        etag = answer.etag or ""
        sha256 = etag if len(etag) == 64 and set(etag) <= set("0123456789abcdef") else None
        return _Announced(answer.commit_hash, answer.size, sha256)

    def _size(self) -> int:
        return self._announced.size

    def _fetch(self, start: int, stop: int) -> bytes:
        """One range, or the whole file; asked again where the trouble may pass."""

        def passing(error: Exception) -> bool:
            return isinstance(error, _BusyError) or hub.is_passing(error)

        try:
            return hub.insist(lambda: self._try(start, stop), passing)
        except AdapterError:
            raise
        # Whatever an answer made of the HTTP client.
        except Exception as error:
            raise AdapterError(
                f"{self.name}: expected bytes {start} to {stop}, got none "
                f"({type(error).__name__}: {error}); try again later",
                reason="remote",
            ) from error

    def _try(self, start: int, stop: int) -> bytes:
        whole = stop - start == self.size
        ask = {} if whole else {"Range": f"bytes={start}-{stop - 1}"}
        deadline = time.monotonic() + PATIENCE + (stop - start) / SLOWEST
        with self._open(ask) as response:
            self._check_head(response, start, stop, whole)
            chunks, length = [], 0
            for chunk in response.iter_raw():
                chunks.append(chunk)
                length += len(chunk)
                self.bytes_read += len(chunk)
                if length > stop - start:
                    break
                if time.monotonic() > deadline:
                    self._wrong(f"{stop - start} bytes in good time", f"{length}, too slowly")
        if length != stop - start:
            self._wrong(f"{stop - start} bytes", f"{length}" + " or more" * (length > stop - start))
        body = b"".join(chunks)
        if whole and self.sha256 and hashlib.sha256(body).hexdigest() != self.sha256:
            self._wrong("the content that the Hub announced", "another, damaged on the way")
        return body

    def _check_head(self, response: Any, start: int, stop: int, whole: bool) -> None:
        if response.status_code in hub.BUSY:
            raise _BusyError(f"status {response.status_code}")
        status = 200 if whole else 206
        if response.status_code != status:
            self._wrong(f"status {status}", f"{response.status_code}")
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            self._wrong("bytes as they are", f"encoded as {shown(encoding)}")
        span = f"bytes {start}-{stop - 1}/{self.size}"
        if not whole and (got := response.headers.get("Content-Range", "")) != span:
            self._wrong(f"Content-Range `{span}`", shown(got))
        length = response.headers.get("Content-Length", str(stop - start))
        if length != str(stop - start):
            self._wrong(f"Content-Length {stop - start}", shown(length))

    @contextmanager
    def _open(self, ask: Mapping[str, str]) -> Iterator[Any]:
        """The answer of the Hub, or of the store that it redirects to and whose address is kept."""
        from huggingface_hub.utils import build_hf_headers, get_session

        home = _url(self.repo_id, self.filename, self.revision)
        headers = {**ask, "Accept-Encoding": "identity"}
        url = self._address or home
        for _ in range(HOPS):
            # The token is for the Hub alone.
            ours = build_hf_headers(library_name="lora_ws") if _origin(url) == _origin(home) else {}
            with get_session().stream(
                "GET", url, headers={**ours, **headers}, follow_redirects=False, timeout=SILENCE
            ) as response:
                if response.status_code in REDIRECTS:
                    url = urljoin(url, response.headers.get("Location", ""))
                    if urlsplit(url).scheme not in ("https", urlsplit(home).scheme):
                        self._wrong("a secure address", shown(url))
                elif response.status_code in REFUSALS and url != home:
                    # A signed address runs out.
                    url = home
                else:
                    self._address = url
                    yield response
                    return
        self._wrong("the file", f"{HOPS} redirects and refusals")

    def _wrong(self, expected: str, got: str) -> NoReturn:
        raise AdapterError(
            f"{self.name}: expected of the server {expected}, got {got}; try again, or download "
            "the file and read it from disk",
            reason="remote",
        )


class _Announced(NamedTuple):
    commit: str
    size: int
    sha256: str | None


class _BusyError(Exception):
    """A status that may pass."""


def list_adapters(repo_id_or_org: str, revision: str | None = None) -> Iterator[HubFile]:
    """The safetensors files of a model repository, or of all that somebody owns.

    Args:
        repo_id_or_org: ``owner/name``, or ``owner`` for all model repositories of theirs.
        revision: branch, tag or commit; of one repository only.

    Yields:
        Files with their sizes in bytes, and the commit they are of. Whether they are adapters, the
        header says.

    Raises:
        NotAvailableError: the Hub cannot be reached, or has no such repository or revision.
    """
    api = hub.client()
    if "/" in repo_id_or_org:
        repositories = [repo_id_or_org]
    else:
        ids = _ask(
            lambda: [model.id for model in api.list_models(author=repo_id_or_org)],
            repo_id_or_org,
            None,
        )
        repositories, revision = sorted(ids), None
    for repo_id in repositories:
        commit, files = _ask(lambda repo_id=repo_id: _tree(repo_id, revision), repo_id, revision)
        for name, size in files:
            if name.endswith(SAFETENSORS):
                yield HubFile(repo_id, name, size, commit)


def _tree(repo_id: str, revision: str | None) -> tuple[str, list[tuple[str, int]]]:
    """The commit, and paths and sizes of its files."""
    from huggingface_hub.hf_api import RepoFile

    api = hub.client()
    commit = api.model_info(repo_id, revision=revision, timeout=SILENCE).sha or ""
    # Not from the repository's description, whose sizes a proxy may leave out.
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return commit, [(file.path, file.size) for file in tree if isinstance(file, RepoFile)]


def _ask(call: Callable[[], Any], repo_id: str, revision: str | None) -> Any:
    try:
        return hub.insist(call, hub.is_passing)
    except Exception as error:
        why = hub.no_answer(error, repo_id, revision)
        raise NotAvailableError(f"{repo_id}: {why}; try again later") from error


def _url(repo_id: str, filename: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    return hf_hub_url(repo_id, filename, revision=revision, endpoint=hub.client().endpoint)


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
