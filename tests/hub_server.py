"""A small Hugging Face Hub on loopback, for tests.

It serves a folder over the part of the Hub's HTTP protocol that ``huggingface_hub`` and
``datasets`` use: repository information, listings, downloads with ranges, and commits with LFS
uploads. Faults can be queued to see what a client does when the network or server misbehaves::

    with HubServer(root) as hub:                      # <root>/{models,datasets}/<owner>/<name>/...
        hub.faults.append(Fault(r"^GET .*/resolve/", "status", status=503))
        HfApi(endpoint=hub.url).dataset_info("owner/name")

Three files in a repository folder are never listed or served: ``.gated`` and ``.private`` restrict
reading to requests with a token, ``.hub.json`` holds fields to add to the repository information
(tags, cardData). ``python hub_server.py ROOT`` serves ROOT until interrupted.

It is not a Hub. There is no git history: the commit id is a hash of the present content, and only
``main`` and that id are revisions. LFS is a rule (suffix or size) about how files are announced and
uploaded. Downloads of LFS files are redirected to a store only where ``cdn`` is set. There is no
Xet (clients that upload need HF_HUB_DISABLE_XET=1), no branches, pull requests or pagination. It
trusts its clients and holds bodies in memory.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import parse_qs, unquote, urlsplit

MARKERS = {".gated", ".private", ".hub.json"}
LFS_SUFFIXES = {".safetensors"}
USER = "tester"
DATE = "2024-01-01T00:00:00.000Z"

Action = Literal[
    "delay", "status", "drop", "reset", "short", "truncate", "no_range", "wrong_range", "wrong_etag"
]


@dataclass
class Fault:
    """Something to do wrong, ``times`` times, to requests whose "METHOD /path" matches a regex.

    delay        answer after ``seconds``
    status       answer ``status`` (429 with ``Retry-After: 0`` unless ``headers`` say otherwise)
    drop, reset  close the connection in the middle of the body, cleanly (FIN) or not (RST)
    short        announce a longer body than is sent, then close the connection
    truncate     leave out the end of the body and announce the smaller length
    no_range     ignore Range: 200 with the whole file
    wrong_range  answer another range than was asked, and say so in Content-Range
    wrong_etag   another ETag
    """

    match: str
    action: Action
    times: int = 1
    status: int = 503
    seconds: float = 1.0
    headers: dict[str, str] = field(default_factory=dict)

    def applies(self, request: Request) -> bool:
        pointless = {
            "no_range": not request.range,
            "wrong_range": not request.range,
            "short": request.method == "HEAD",
            "truncate": request.method == "HEAD",
        }
        if self.times < 1 or pointless.get(self.action):
            return False
        return re.search(self.match, f"{request.method} {request.path}") is not None


class LogEntry(NamedTuple):
    """One answered request; ``path`` is unquoted, has no query; ``bytes_sent`` is of the body."""

    method: str
    path: str
    status: int
    bytes_sent: int


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    token: str | None
    range: str | None
    body: bytes
    args: dict[str, str] = field(default_factory=dict)
    shift: int = 0  # set by wrong_range: answer a range moved by so many bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None  # Content-Length, where it is not that of the body
    cut: int | None = None  # close the connection after so many bytes of the body
    reset: bool = False


class HubError(Exception):
    """An error answer; from ``code`` (X-Error-Code) clients choose the exception type."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        text = ascii(message)[1:-1]  # fit for a header, whatever the request contained
        headers = {"X-Error-Code": code, "X-Error-Message": text, "X-Repo-Commit": commit}
        headers = {name: value for name, value in headers.items() if value}
        self.reply = json_reply({"error": message}, status, headers)


def json_reply(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    headers = {"Content-Type": "application/json", **(headers or {})}
    return Reply(status, json.dumps(data).encode(), headers)


# Repositories on disk


class Blob(NamedTuple):
    size: int
    oid: str  # as git would name the content
    sha256: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid

    def lfs(self, oid_key: str) -> dict[str, Any]:
        """The ``lfs`` entry of a listing; its key for the hash differs between endpoints."""
        pointer = {oid_key: self.sha256, "size": self.size, "pointerSize": 130}
        return {"lfs": pointer} if self.is_lfs else {}


def is_safe(path: str) -> bool:
    parts = path.split("/")
    return "\0" not in path and not {"", ".", ".."} & set(parts) and parts[0] not in MARKERS


@dataclass
class Repo:
    """The present content of a repository folder, hashed; made anew for each request."""

    kind: str
    id: str
    folder: Path
    blobs: dict[str, Blob]

    def __post_init__(self) -> None:
        content = [f"{path} {blob.sha256}\n" for path, blob in self.blobs.items()]
        self.commit = hashlib.sha1("".join([self.kind, self.id, *content]).encode()).hexdigest()
        parents = {str(parent) for path in self.blobs for parent in Path(path).parents}
        self.folders = sorted(parents - {"."})

    def error(self, status: int, message: str, code: str = "") -> HubError:
        return HubError(status, message, code, self.commit)

    def blob(self, path: str) -> Blob:
        if path not in self.blobs:
            raise self.error(404, f"{path} does not exist on this revision", "EntryNotFound")
        return self.blobs[path]

    def entry(self, path: str, expand: bool) -> dict[str, Any]:
        if path in self.blobs:
            blob = self.blobs[path]
            entry = {"type": "file", "size": blob.size, "oid": blob.oid, **blob.lfs("oid")}
        else:
            entry = {"type": "directory", "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
        if expand:
            entry["lastCommit"] = {"id": self.commit, "title": "content", "date": DATE}
        return {"path": path, **entry}

    def info(self, with_sizes: bool) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in self.blobs]
        if with_sizes:
            for sibling, blob in zip(siblings, self.blobs.values(), strict=True):
                sibling |= {"size": blob.size, "blobId": blob.oid, **blob.lfs("sha256")}
        info = {"_id": self.commit[:24], "id": self.id, "author": self.id.split("/")[0]}
        info |= {"sha": self.commit, "lastModified": DATE, "createdAt": DATE, "disabled": False}
        gated = "manual" if self.has(".gated") else False
        info |= {"private": self.has(".private"), "gated": gated}
        info |= {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
        extra = self.folder / ".hub.json"
        return info | (json.loads(extra.read_text(encoding="utf-8")) if extra.exists() else {})

    def has(self, marker: str) -> bool:
        return (self.folder / marker).exists()


class Store:
    """The folder of repositories, and the uploaded objects that no commit has claimed yet."""

    def __init__(self, root: Path, lfs_limit: int) -> None:
        self.root = root.resolve()
        self.lfs_limit = lfs_limit
        self.lock = threading.RLock()
        self.uploads: dict[str, bytes] = {}  # empty: announced by a batch request, not yet sent
        self._hashes: dict[tuple[Any, ...], Blob] = {}

    def mode(self, path: str, size: int) -> str:
        large = size > self.lfs_limit or Path(path).suffix in LFS_SUFFIXES
        return "lfs" if large and size else "regular"

    def folder(self, kind: str, repo_id: str) -> Path:
        if repo_id.count("/") != 1 or not is_safe(repo_id):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.root / kind / repo_id

    def repo(self, kind: str, repo_id: str) -> Repo:
        folder = self.folder(kind, repo_id)
        if not folder.is_dir() or not self._inside(folder):
            raise HubError(404, "Repository not found", "RepoNotFound")
        with self.lock:
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            names = {path.relative_to(folder).as_posix(): path for path in paths}
            served = {n: p for n, p in names.items() if is_safe(n) and self._inside(p)}
            blobs = {name: self._blob(name, path) for name, path in served.items()}
        return Repo(kind, repo_id, folder, blobs)

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.root)

    def _blob(self, name: str, path: Path) -> Blob:
        stat = path.stat()
        key = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            data = path.read_bytes()
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            is_lfs = self.mode(name, len(data)) == "lfs"
            self._hashes[key] = Blob(len(data), oid, hashlib.sha256(data).hexdigest(), is_lfs)
        return self._hashes[key]

    def read(self, repo: Repo, path: str, start: int, count: int) -> bytes:
        with self.lock, (repo.folder / path).open("rb") as file:
            file.seek(start)
            return file.read(count)

    def lfs_content(self, repo: Repo, oid: str) -> bytes:
        if self.uploads.get(oid):
            return self.uploads[oid]
        for path, blob in repo.blobs.items():
            if blob.sha256 == oid:
                return self.read(repo, path, 0, blob.size)
        raise repo.error(400, f"LFS object {oid} was not uploaded")

    def commit(self, repo: Repo, operations: list[dict[str, Any]]) -> Repo:
        """Apply all operations of a commit, after checking all of them."""
        with self.lock:
            changes: list[tuple[str, bytes | None]] = []
            for operation in operations:
                changes += self._changes(repo, operation["key"], operation["value"])
            for path, content in changes:
                target = repo.folder / path
                if content is None:
                    target.unlink(missing_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
            return self.repo(repo.kind, repo.id)

    def _changes(self, repo: Repo, key: str, value: dict[str, Any]) -> list[tuple[str, Any]]:
        if key == "header":
            if value.get("parentCommit") not in (None, repo.commit):
                raise repo.error(412, "A commit has happened since")
            return []
        path = value["path"].rstrip("/")
        if not is_safe(path) or not self._inside(repo.folder / path):
            raise repo.error(400, f"Invalid path {path!r}")
        match key:
            case "file":
                return [(path, base64.b64decode(value["content"]))]
            case "lfsFile":
                return [(path, self.lfs_content(repo, value["oid"]))]
            case "deletedFile":
                repo.blob(path)
                return [(path, None)]
            case "deletedFolder":
                return [(name, None) for name in repo.blobs if name.startswith(path + "/")]
        raise repo.error(400, f"Unknown operation {key!r}")


# Endpoints

Endpoint = Callable[["HubServer", Request], Reply]
Route = tuple[str, "re.Pattern[str]", bool, Endpoint]
ROUTES: list[Route] = []
PARAMETERS = {
    "kind": r"(?P<kind>models|datasets)",
    "git": r"(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+?)",  # models have no prefix outside /api
    "id": r"(?P<id>[^/]+/[^/]+)",
    "rev": r"(?P<rev>[^/]+)",
    "path": r"(?P<path>.+)",
    "oid": r"(?P<oid>[0-9a-f]{64})",
}


def route(method: str, template: str, write: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Register an endpoint; ``write`` endpoints need a token."""
    pattern = re.compile(template.format_map(PARAMETERS))

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, pattern, write, endpoint))
        return endpoint

    return register


def find_repo(hub: HubServer, request: Request) -> Repo:
    """The repository and revision that a request names, if it may be read."""
    repo = hub.store.repo(request.args.get("kind", "models"), request.args["id"])
    if not hub.authorized(request):
        if repo.has(".gated"):
            status = 403 if request.token else 401
            raise HubError(status, "Access to this repository is restricted", "GatedRepo")
        if repo.has(".private"):
            raise HubError(401, "Repository not found", "RepoNotFound")
    if request.args.get("rev", "main") not in ("main", repo.commit):
        raise HubError(404, f"Invalid rev id: {request.args['rev']}", "RevisionNotFound")
    return repo


@route("GET", "/api/{kind}")
def list_repos(hub: HubServer, request: Request) -> Reply:
    kind, (author,) = request.args["kind"], request.query["author"]
    folders = sorted(hub.store.folder(kind, f"{author}/any").parent.glob("*"))
    return json_reply([hub.store.repo(kind, f"{author}/{f.name}").info(False) for f in folders])


@route("GET", "/api/{kind}/{id}(?:/revision/{rev})?")
def repo_info(hub: HubServer, request: Request) -> Reply:
    return json_reply(find_repo(hub, request).info(request.flag("blobs")))


@route("GET", "/api/{kind}/{id}/tree/{rev}(?:/{path})?/?")
def list_tree(hub: HubServer, request: Request) -> Reply:
    repo = find_repo(hub, request)
    folder = request.args.get("path", "").rstrip("/")
    if folder and folder not in repo.folders:
        raise repo.error(404, f"{folder} does not exist on this revision", "EntryNotFound")
    prefix = f"{folder}/" if folder else ""
    names = [name for name in [*repo.folders, *repo.blobs] if name.startswith(prefix)]
    if not request.flag("recursive"):
        names = [name for name in names if "/" not in name[len(prefix) :]]
    return json_reply([repo.entry(name, request.flag("expand")) for name in names])


@route("POST", "/api/{kind}/{id}/paths-info/{rev}")
def paths_info(hub: HubServer, request: Request) -> Reply:
    repo = find_repo(hub, request)
    if request.body.startswith(b"{"):
        form = request.json()
        paths, expand = form["paths"], bool(form.get("expand"))
    else:
        request.query = parse_qs(request.body.decode())
        paths, expand = request.query.get("paths", []), request.flag("expand")
    known = [path for path in paths if path in repo.blobs or path in repo.folders]
    return json_reply([repo.entry(path, expand) for path in known])


@route("GET", "/{git}/resolve/{rev}/{path}")
def resolve(hub: HubServer, request: Request) -> Reply:
    repo = find_repo(hub, request)
    path = request.args["path"]
    blob = repo.blob(path)
    headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
    if hub.cdn and blob.is_lfs:
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": headers["ETag"]}
        headers["Location"] = f"{hub.cdn}/cdn/{repo.id}/{path}?signature=1"
        return Reply(302, b"", headers)
    return content(hub, request, repo, headers)


@route("GET", "/cdn/{id}/{path}")  # the store: signed addresses, no tokens
def stored(hub: HubServer, request: Request) -> Reply:
    if "signature" not in request.query:
        raise HubError(403, "Missing signature")
    return content(hub, request, hub.store.repo("models", request.args["id"]), {})


def content(hub: HubServer, request: Request, repo: Repo, headers: dict[str, str]) -> Reply:
    path = request.args["path"]
    blob = repo.blob(path)
    asked = byte_range(request.range, blob.size) if request.method == "GET" else None
    start, end = asked or (0, blob.size)
    if start >= end and asked:
        headers["Content-Range"] = f"bytes */{blob.size}"
        return Reply(416, b"", headers)
    if asked:
        shift = request.shift if end < blob.size else -request.shift
        start, end = max(start + shift, 0), end + shift
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
    body = hub.store.read(repo, path, start, end - start) if request.method == "GET" else b""
    return Reply(206 if asked else 200, body, headers, length=end - start)


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of a Range header; None for what a server may ignore."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


@route("GET", "/api/whoami-v2", write=True)
def whoami(hub: HubServer, request: Request) -> Reply:
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return json_reply({"type": "user", "id": "0", "name": USER, "orgs": [], "auth": auth})


@route("POST", "/api/repos/create", write=True)
def create_repo(hub: HubServer, request: Request) -> Reply:
    form = request.json()
    kind = {"model": "models", "dataset": "datasets"}.get(form.get("type") or "model")
    if not kind:
        raise HubError(400, "Only models and datasets can be created")
    repo_id = f"{form.get('organization') or USER}/{form['name']}"
    folder = hub.store.folder(kind, repo_id)
    url = f"{hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
    if folder.exists():
        return json_reply({"error": "You already created this repo", "url": url}, 409)
    folder.mkdir(parents=True)
    if form.get("visibility") == "private" or form.get("private"):
        (folder / ".private").touch()
    return json_reply({"url": url, "name": repo_id})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Reply:
    return json_reply({"errors": [], "warnings": []})


@route("POST", "/api/{kind}/{id}/preupload/{rev}", write=True)
def preupload(hub: HubServer, request: Request) -> Reply:
    repo = find_repo(hub, request)
    answer = []
    for file in request.json()["files"]:
        path, known = file["path"], repo.blobs.get(file["path"])
        mode = {"uploadMode": hub.store.mode(path, file["size"]), "shouldIgnore": False}
        answer.append({"path": path, **mode, "oid": known.etag if known else None})
    return json_reply({"files": answer})


@route("POST", r"/{git}\.git/info/lfs/objects/batch", write=True)
def lfs_batch(hub: HubServer, request: Request) -> Reply:
    find_repo(hub, request)
    objects = []
    for item in request.json()["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if not hub.store.uploads.setdefault(item["oid"], b""):
            entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
        objects.append(entry)
    return json_reply({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{oid}")  # like a signed address: no token, but the object must be announced
def lfs_upload(hub: HubServer, request: Request) -> Reply:
    oid = request.args["oid"]
    if oid not in hub.store.uploads or hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "Not an announced object")
    hub.store.uploads[oid] = request.body
    return Reply()


@route("POST", "/api/{kind}/{id}/commit/{rev}", write=True)
def commit(hub: HubServer, request: Request) -> Reply:
    operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    repo = hub.store.commit(find_repo(hub, request), operations)
    url = f"{hub.url}/{'datasets/' if repo.kind == 'datasets' else ''}{repo.id}"
    return json_reply({"commitUrl": f"{url}/commit/{repo.commit}", "commitOid": repo.commit})


# The server


def spoil(reply: Reply, fault: Fault) -> None:
    """Apply the faults that change a finished answer."""
    half = len(reply.body) // 2
    match fault.action:
        case "drop" | "reset":
            reply.cut, reply.reset = half, fault.action == "reset"
        case "short":
            reply.cut, reply.length = len(reply.body), len(reply.body) + 1000
        case "truncate":
            reply.body, reply.length = reply.body[:half], half
        case "wrong_etag":
            old = reply.headers.get("ETag", "")
            reply.headers["ETag"] = f'"{hashlib.sha256(old.encode()).hexdigest()}"'
    reply.headers |= fault.headers


class HubServer(ThreadingHTTPServer):
    """Serve ``root`` from a thread, as a context manager.

    Writing needs ``token``, or any token if it is None. Files over ``lfs_limit`` bytes are LFS.
    Unexpected exceptions in the server are answered with 500 and kept in ``errors``.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, root: str | Path, token: str | None = None, lfs_limit: int = 1 << 20, port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), Connection)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = Store(Path(root), lfs_limit)
        self.token = token
        self.cdn = ""  # address of a HubServer of the same root, which then hands out LFS files
        self.faults: list[Fault] = []
        self.log: list[LogEntry] = []
        self.errors: list[Exception] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop serving, and close connections that clients keep open."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def bytes_sent(self) -> int:
        with self.lock:
            return sum(entry.bytes_sent for entry in self.log)

    def requests(self, match: str = "") -> list[LogEntry]:
        """A copy of the log, of the requests whose "METHOD /path" matches."""
        with self.lock:
            return [e for e in self.log if re.search(match, f"{e.method} {e.path}")]

    def clear(self) -> None:
        """Forget log and faults."""
        with self.lock:
            self.log.clear()
            self.faults.clear()

    def authorized(self, request: Request) -> bool:
        return request.token == self.token if self.token else bool(request.token)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about connections that a client or a fault has broken."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            self.errors.append(error)

    def answer(self, request: Request, raw_path: str) -> Reply:
        fault = self._take_fault(request)
        action = fault.action if fault else None
        if fault and action == "status":
            headers = {"Retry-After": "0"} if fault.status == 429 else {}
            return json_reply({"error": "injected"}, fault.status, headers | fault.headers)
        if fault and action == "delay":
            self.stopping.wait(fault.seconds)
        if action == "no_range":
            request.range = None
        request.shift = int(action == "wrong_range")
        try:
            reply = self._dispatch(request, raw_path)
        except HubError as error:
            reply = error.reply
        except Exception as error:
            self.errors.append(error)
            reply = json_reply({"error": repr(error)}, 500)
        if fault:
            spoil(reply, fault)
        return reply

    def _take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.applies(request)), None)
            if fault:
                fault.times -= 1
            return fault

    def _dispatch(self, request: Request, raw_path: str) -> Reply:
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, write, endpoint in ROUTES:
            match = pattern.fullmatch(raw_path)
            if match and method == route_method:
                if write and not self.authorized(request):
                    raise HubError(401, "Invalid credentials in Authorization header")
                request.args = {k: unquote(v) for k, v in match.groupdict().items() if v}
                return endpoint(self, request)
        raise HubError(404, f"No such address: {request.method} {request.path}")


class Connection(BaseHTTPRequestHandler):
    """One client connection: bytes to Request, Reply to bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub = cast(HubServer, self.server)
        self.hub.connections.add(self.request)

    def finish(self) -> None:
        self.hub.connections.discard(self.request)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        url = urlsplit(self.path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        request = Request(
            method=self.command,
            path=unquote(url.path),
            query=parse_qs(url.query),
            token=token if scheme.lower() == "bearer" else None,
            range=self.headers.get("Range"),
            body=self.read_body(),
        )
        self.send(request, self.hub.answer(request, url.path))

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError("The client went away")
            return body
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, request: Request, reply: Reply) -> None:
        body = b"" if request.method == "HEAD" else reply.body[: reply.cut]
        self.close_connection |= reply.cut is not None
        entry = LogEntry(request.method, request.path, reply.status, len(body))
        with self.hub.lock:
            self.hub.log.append(entry)  # before sending, so that the client cannot be faster
        if body or reply.cut is None:
            self.send_head(reply)
            self.wfile.write(body)
        if reply.reset:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()

    def send_head(self, reply: Reply) -> None:
        self.send_response(reply.status)
        length = len(reply.body) if reply.length is None else reply.length
        for name, value in ({"Content-Length": str(length)} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder as a Hugging Face Hub, for tests.")
    parser.add_argument("root", help="folder with models/ and datasets/")
    parser.add_argument("--token", help="the token that writing needs (default: any)")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with HubServer(args.root, args.token, port=args.port) as server:
        print(server.url, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
