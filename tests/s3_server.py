"""A small S3-compatible store on loopback, for tests.

It serves a folder, buckets being its folders, over the part of the protocol that s3fs uses:
listings (pages of two), heads, downloads with ranges, uploads in one piece. It checks no login.
``faults`` says, by a regular expression of "METHOD /path", what goes wrong with the next requests.
"""

import hashlib
import re
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 2
# drop: close the connection in the middle of the body; long, short: more or fewer bytes than asked
# for, announced as such; no_range: the whole file; change: the file is another from then on.
Action = Literal["drop", "long", "short", "no_range", "busy", "change", "forbid"]


class Fault(NamedTuple):
    """What to do wrong, and to which requests."""

    match: str
    action: Action


class S3Server:
    """A context manager; `log` has "METHOD /path" of all requests, with their ranges."""

    def __init__(self, root: Path) -> None:
        self.root, self.faults, self.log = root, list[Fault](), list[str]()

    def __enter__(self) -> Self:
        owner = self

        class Handler(_Handler):
            store = owner

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def env(self) -> dict[str, str]:
        """What makes a client of S3 one of this store."""
        keys = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret"}
        return {**keys, "AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1"}


class _Handler(BaseHTTPRequestHandler):
    store: S3Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle_one(self, put: bytes | None = None) -> None:
        asked = urlsplit(self.path)
        path, query = unquote(asked.path), parse_qs(asked.query, keep_blank_values=True)
        span = self.headers.get("Range", "")
        line = f"{self.command} {path}"
        self.store.log.append(f"{line} {span}".strip())
        action = self._fault(line)
        file = self.store.root / path.strip("/")
        if action == "busy":
            self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
        elif action == "forbid":
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif put is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(put)
            self._answer(200, b"", ETag=_etag(file))
        elif "list-type" in query:
            self._answer(200, self._listing(file, query))
        elif not file.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            if action == "change":
                file.write_bytes(file.read_bytes()[:-1] + b"?")
            self._send(file, span, action)

    def do_GET(self) -> None:
        """Listings and downloads."""
        self.handle_one()

    def do_HEAD(self) -> None:
        """What is known of an object."""
        self.handle_one()

    def do_PUT(self) -> None:
        """Uploads, also those in signed chunks."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        self.handle_one(body)

    def _fault(self, line: str) -> str:
        for fault in self.store.faults:
            if re.search(fault.match, line):
                self.store.faults.remove(fault)
                return fault.action
        return ""

    def _send(self, file: Path, span: str, action: str) -> None:
        data, status, headers = file.read_bytes(), 200, {"ETag": _etag(file)}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
        if match and action != "no_range":
            start, stop = int(match[1]), int(match[2]) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            stop += {"long": 1, "short": -1}.get(action, 0)
            data, status = data[start:stop], 206
        elif action == "short":
            data = data[:-1]
        headers["Last-Modified"] = formatdate(file.stat().st_mtime, usegmt=True)
        self._answer(status, data, cut=len(data) // 2 if action == "drop" else None, **headers)

    def _answer(self, status: int, body: bytes, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def _listing(self, bucket: Path, query: dict[str, list[str]]) -> bytes:
        prefix, flat = query.get("prefix", [""])[0], not query.get("delimiter", [""])[0]
        after = query.get("continuation-token", [""])[0]
        files = sorted(
            (file.relative_to(bucket).as_posix(), file)
            for file in bucket.rglob("*")
            if file.is_file()
        )
        found = [
            (name, file)
            for name, file in files
            if name.startswith(prefix) and (flat or "/" not in name[len(prefix) :]) and name > after
        ]
        page, more = found[:PAGE], len(found) > PAGE
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{file.stat().st_size}</Size>"
            f"<ETag>{_etag(file)}</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for name, file in page
        )
        last = (
            f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if more else ""
        )
        return (
            f"<ListBucketResult><Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{last}{contents}</ListBucketResult>"
        ).encode()


def _etag(file: Path) -> str:
    return f'"{hashlib.md5(file.read_bytes()).hexdigest()}"'


def _unchunked(body: bytes) -> bytes:
    found = b""
    while body:
        head, _, body = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            break
        found, body = found + body[:size], body[size + 2 :]
    return found


def clear() -> None:
    """Forget clients, which know one server each."""
    kinds: Any = __import__("s3fs")
    kinds.S3FileSystem.clear_instance_cache()
