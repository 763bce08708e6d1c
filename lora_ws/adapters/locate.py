"""Where one adapter file is, by its name: on this machine, on the Hub, or elsewhere."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_ws.adapters.addressed import FsspecSource
from lora_ws.adapters.header import CONVERT
from lora_ws.adapters.remote import SAFETENSORS, HubSource
from lora_ws.adapters.settings import PEFT_CONFIG
from lora_ws.adapters.source import LocalSource, Source, not_a_file
from lora_ws.addresses import beside, is_address, path_of
from lora_ws.errors import AdapterError, NotAvailableError
from lora_ws.hub import HF, HubPath

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz")
HUB = "hub:"
POINTER = b"version https://git-lfs"
# Longer ones are no settings.
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class AdapterRef:
    """One adapter file, not opened yet.

    Attributes:
        name: what the user and messages call it.
        path: a file or PEFT folder on this machine; None elsewhere.
        repo_id: of a file on the Hub.
        filename: in the repository.
        revision: asked for; None for the default branch.
        problem: why there is no such file, where that is known already; `open` raises it.
        address: of fsspec, where it is neither on this machine nor on the Hub.

    Example:
        >>> AdapterRef.parse("hub:owner/name/a.safetensors@main").repo_id
        'owner/name'
    """

    name: str
    path: Path | None = None
    repo_id: str = ""
    filename: str = ""
    revision: str | None = None
    problem: AdapterError | NotAvailableError | None = None
    address: str = ""

    @classmethod
    def parse(cls, handle: str | Path) -> "AdapterRef":
        """One file, by the name that a user gives it.

        Args:
            handle: a path, or ``hub:owner/name/file.safetensors``, with ``@revision`` behind it,
                or the same as ``hf://owner/name@revision/file.safetensors``; or an address of
                fsspec, such as ``s3://bucket/file.safetensors``.

        Raises:
            AdapterError: a name on the Hub that names no file.

        Example:
            >>> AdapterRef.parse("hub:owner/name/folder/a.safetensors@main").filename
            'folder/a.safetensors'
        """
        text = str(handle)
        if text.startswith(HF):
            text = hub_name(HubPath.parse(text))
        if is_address(text):
            return cls(text, address=text)
        if not text.startswith(HUB):
            return cls(readable(handle), Path(handle))
        address, _, revision = text.removeprefix(HUB).partition("@")
        owner, name, *rest = [*address.split("/", 2), "", ""][:3]
        if not rest[0]:
            raise AdapterError(
                f"{text}: expected a file, such as {HUB}{owner or 'owner'}/{name or 'name'}/"
                "pytorch_lora_weights.safetensors; `lora-ws scan` takes whole repositories",
                "missing",
            )
        return cls(text, None, f"{owner}/{name}", rest[0], revision or None)

    def open(self) -> tuple[Source, str | None]:
        """Its bytes, and the text of the adapter_config.json beside a PEFT file.

        Raises:
            AdapterError: there is no such file, or it is a pickle.
            NotAvailableError: the Hub cannot be reached, or has no such repository or revision.
        """
        if self.problem:
            raise self.problem
        if self.path is None:
            return self._open_remote()
        file = self.file()
        name = readable(file) if self.path.is_dir() else self.name
        # Of all others the header says what they are.
        if file.suffix.lower() in (*PICKLED, *ARCHIVES) and not _is_pointer(file):
            _refuse_other_kinds(name, file.suffix)
        return LocalSource(file, name), settings_beside(file)

    def file(self) -> Path:
        """The file of weights on this machine.

        Raises:
            AdapterError: there is none, or it is elsewhere.
        """
        if self.path is None:
            raise AdapterError(
                f"{self.name}: expected a file on this machine; download it", "remote"
            )
        inside = [self.path / name for name in (PEFT_WEIGHTS, PEFT_PICKLE)]
        if exists(self.path):
            for file in inside if self.path.is_dir() else [self.path]:
                if file.is_file():
                    return file
            if not self.path.is_dir():
                raise not_a_file(self.name, self.path.stat().st_mode)
            raise AdapterError(
                f"{self.name}: expected a .safetensors file or a PEFT folder, got another folder; "
                "name a file in it, or `lora-ws scan` the folder",
                "missing",
            )
        raise AdapterError(
            f"{self.name}: expected a .safetensors file or a PEFT folder, found nothing there",
            "missing",
        )

    def _open_remote(self) -> tuple[Source, str | None]:
        path = PurePosixPath(path_of(self.address) if self.address else self.filename)
        _refuse_other_kinds(self.name, path.suffix)
        source, settings = self._source(path.name), None
        if path.name == PEFT_WEIGHTS:
            try:
                settings = _text(self._source(PEFT_CONFIG, source.revision))
            except AdapterError as error:
                if error.reason != "missing":
                    raise
        return source, settings

    def _source(self, name: str, revision: str = "") -> Source:
        """This file, or one beside it."""
        if self.address:
            return FsspecSource(beside(self.address, name))
        file = str(PurePosixPath(self.filename).with_name(name))
        place = HubPath(self.repo_id, file, self.revision)
        called = self.name if file == self.filename else hub_name(place)
        return HubSource(self.repo_id, file, revision or self.revision, name=called)


def hub_name(place: HubPath) -> str:
    """The name of a place on the Hub, as reports have it: ``hub:owner/name/file@revision``."""
    revision = f"@{place.revision}" if place.revision else ""
    return f"{HUB}{place.repo_id}/{place.path}".rstrip("/") + revision


def exists(name: str | Path) -> bool:
    """Whether there is a file or folder of a name, be it one that no system takes."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def readable(path: str | Path) -> str:
    """The name as reports can hold it: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def settings_beside(file: Path) -> str | None:
    """The text of the adapter_config.json beside a PEFT file; None beside others."""
    beside = file.with_name(PEFT_CONFIG)
    if file.name not in (PEFT_WEIGHTS, PEFT_PICKLE) or not beside.is_file():
        return None
    with LocalSource(beside) as source:
        return _text(source)


def _is_pointer(file: Path) -> bool:
    """Whether Git LFS has not fetched a file yet, which reading its header says."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(POINTER)) == POINTER
    except OSError:
        return False


def _refuse_other_kinds(file: str, suffix: str) -> None:
    suffix = suffix.lower()
    if suffix in ARCHIVES:
        raise AdapterError(
            f"{file}: expected a .safetensors file, got an archive (`{suffix}`); unpack it and "
            "name the folder",
            "archive",
        )
    if suffix != SAFETENSORS:
        raise AdapterError(
            f"{file}: expected a .safetensors file, got `{suffix or 'no suffix'}`; pickled files "
            f"can run code when opened and are refused; {CONVERT}",
            "pickle",
        )


def _text(source: Source) -> str:
    if source.size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{source.name}: expected settings, got {source.size} bytes", "config")
    return source.read([(0, source.size)])[0].decode(errors="replace")
