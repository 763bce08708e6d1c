"""Where adapter files are: named by a user, found in folders, lists and on the Hub."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_ws.adapters.header import CONVERT
from lora_ws.adapters.remote import SAFETENSORS, HubSource, list_adapters
from lora_ws.adapters.settings import PEFT_CONFIG
from lora_ws.adapters.source import LocalSource, Source
from lora_ws.errors import AdapterError

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LIST = ".txt"
HUB = "hub:"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Longer ones are no settings.
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class AdapterRef:
    """One adapter file, not opened yet.

    Attributes:
        name: what the user and messages call it.
        path: a file or PEFT folder on this machine; None on the Hub.
        repo_id: of a file on the Hub.
        filename: in the repository.
        revision: asked for; None for the default branch.
    """

    name: str
    path: Path | None = None
    repo_id: str = ""
    filename: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, handle: str | Path) -> "AdapterRef":
        """One file, by the name that a user gives it.

        Args:
            handle: a path, or ``hub:owner/name/file.safetensors``, with ``@revision`` behind it.

        Raises:
            AdapterError: a name on the Hub that names no file.

        Example:
            >>> AdapterRef.parse("hub:owner/name/folder/a.safetensors@main").filename
            'folder/a.safetensors'
        """
        text = str(handle)
        if not text.startswith(HUB):
            return cls(_readable(handle), Path(handle))
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
        if self.path is None:
            return self._open_remote()
        file = self.file()
        name = str(file) if self.path.is_dir() else self.name
        _refuse_pickle(name)
        return LocalSource(file, name), settings_beside(file)

    def file(self) -> Path:
        """The file of weights on this machine.

        Raises:
            AdapterError: there is none, or it is on the Hub.
        """
        if self.path is None:
            raise AdapterError(
                f"{self.name}: expected a file on this machine; download it", "remote"
            )
        inside = [self.path / name for name in (PEFT_WEIGHTS, PEFT_PICKLE)]
        for file in inside if self.path.is_dir() else [self.path]:
            if file.is_file():
                return file
        raise AdapterError(
            f"{self.name}: expected a .safetensors file or a PEFT folder, found neither", "missing"
        )

    def _open_remote(self) -> tuple[Source, str | None]:
        _refuse_pickle(self.name)
        source = HubSource(self.repo_id, self.filename, self.revision)
        file = PurePosixPath(self.filename)
        if file.name != PEFT_WEIGHTS:
            return source, None
        beside = HubSource(self.repo_id, str(file.with_name(PEFT_CONFIG)), source.revision)
        try:
            return source, _text(beside)
        except AdapterError as error:
            if error.reason != "missing":
                raise
            return source, None


def find_adapters(what: str) -> Iterator[AdapterRef]:
    """All adapter files under a name.

    Args:
        what: a file; a folder, searched with its folders for safetensors and pickled files; a
            ``.txt`` list with a name per line, ``#`` for remarks; on the Hub ``owner/name``,
            ``hub:owner/name``, a file of it, or ``hub:owner`` for all of an owner's repositories.

    Raises:
        AdapterError: there is nothing of that name.
        NotAvailableError: the Hub cannot be reached, or has no such repository or revision.
    """
    path = Path(what)
    if what.startswith(HUB):
        yield from _on_hub(what)
    elif path.is_dir():
        yield from _in_folder(path)
    elif path.suffix == LIST and path.is_file():
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            if name := line.partition("#")[0].strip():
                yield from _listed(name)
    elif path.exists():
        yield AdapterRef(_readable(what), path)
    elif REPOSITORY.fullmatch(what) and path.suffix not in (SAFETENSORS, LIST, *PICKLED):
        yield from _on_hub(f"{HUB}{what}")
    else:
        raise AdapterError(
            f"{what}: expected a file, folder, .txt list or repository on the Hub "
            f"({HUB}owner/name, or {HUB}owner for all of theirs), found none of that name",
            "missing",
        )


def _listed(name: str) -> Iterator[AdapterRef]:
    """A name in a list; a file that is not there is found out when it is opened."""
    path = Path(name)
    if path.suffix == LIST or (not path.exists() and path.suffix in (SAFETENSORS, *PICKLED)):
        yield AdapterRef.parse(name)
    else:
        yield from find_adapters(name)


def _in_folder(folder: Path) -> Iterator[AdapterRef]:
    """Files in the order of their names; links to folders are not followed."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in (SAFETENSORS, *PICKLED):
                file = Path(root, name)
                yield AdapterRef(_readable(file), file)


def _readable(path: str | Path) -> str:
    """The name as reports can hold it: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _on_hub(what: str) -> Iterator[AdapterRef]:
    address, _, revision = what.removeprefix(HUB).partition("@")
    if address.count("/") > 1:
        yield AdapterRef.parse(what)
        return
    for file in list_adapters(address, revision or None):
        name = f"{HUB}{file.repo_id}/{file.filename}"
        yield AdapterRef(name, None, file.repo_id, file.filename, file.revision)


def settings_beside(file: Path) -> str | None:
    """The text of the adapter_config.json beside a PEFT file; None beside others."""
    beside = file.with_name(PEFT_CONFIG)
    if file.name not in (PEFT_WEIGHTS, PEFT_PICKLE) or not beside.is_file():
        return None
    with LocalSource(beside) as source:
        return _text(source)


def _refuse_pickle(file: str) -> None:
    if (suffix := Path(file).suffix.lower()) != SAFETENSORS:
        raise AdapterError(
            f"{file}: expected a .safetensors file, got `{suffix or 'no suffix'}`; pickled files "
            f"can run code when opened and are refused; {CONVERT}",
            "pickle",
        )


def _text(source: Source) -> str:
    if source.size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{source.name}: expected settings, got {source.size} bytes", "config")
    return source.read([(0, source.size)])[0].decode(errors="replace")
