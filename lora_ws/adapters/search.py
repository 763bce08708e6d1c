"""Find adapter files: in folders, in lists, and in repositories on the Hub, each file once."""

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import overload

from lora_ws.adapters.locate import (
    ARCHIVES,
    HUB,
    PEFT_WEIGHTS,
    PICKLED,
    AdapterRef,
    exists,
    hub_name,
    readable,
)
from lora_ws.adapters.remote import SAFETENSORS, list_adapters
from lora_ws.addresses import WEB, files_below, is_address, path_of
from lora_ws.errors import AdapterError, NotAvailableError
from lora_ws.hub import HF, HubPath

LIST = ".txt"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# What a search leaves out.
SAME_FILE = "links and other names of files that are listed"
SAME_FOLDER = "links to folders that are searched"
OTHER_KIND = "files of other kinds"
CLOSED = "folders that cannot be opened"


@dataclass(frozen=True)
class FoundAdapters(Sequence[AdapterRef]):
    """The adapter files that a search found, none of them opened yet.

    Attributes:
        refs: the files, in the order of the names that were given, folders in that of their names.
        left_out: reason -> number of files or folders.

    Example:
        >>> from importlib.resources import files
        >>> found = find_adapters(str(files("lora_ws") / "_assets/digit_testbed"))
        >>> found[0].path.name, found.left_out
        ('ball.safetensors', {'files of other kinds': 1})
    """

    refs: tuple[AdapterRef, ...]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.refs)

    @overload
    def __getitem__(self, row: int) -> AdapterRef: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[AdapterRef, ...]: ...
    def __getitem__(self, row: int | slice) -> AdapterRef | tuple[AdapterRef, ...]:
        return self.refs[row]


def find_adapters(*what: str) -> FoundAdapters:
    """Find the adapter files under names, each file once, whatever links lead to it.

    Args:
        what: each a file; a folder, searched with its folders and what they link to for
            safetensors, pickled files and archives; a ``.txt`` list with one such name per line,
            where lines that begin with ``#`` are remarks; on the Hub ``owner/name``,
            ``hub:owner/name``, a file of it, or ``hub:owner`` for all of an owner's repositories;
            ``hf://owner/name@revision``, a folder or a file of it; an address of fsspec, such as
            ``s3://bucket/folder``, of a folder or a file.
            A line that names nothing is a file that cannot be opened, and ends nothing.

    Raises:
        AdapterError: there is nothing of a name that is given here.
        NotAvailableError: the Hub cannot be reached, or has no such repository or revision.

    Example:
        >>> from importlib.resources import files
        >>> folder = files("lora_ws") / "_assets/digit_testbed"
        >>> len(find_adapters(str(folder)))
        11
    """
    search = _Search()
    for name in what:
        search.add(name)
    # Other names of files that are listed are counted on the way.
    refs = tuple(search.each_once())
    return FoundAdapters(refs, dict(search.left_out))


@dataclass
class _Search:
    refs: list[AdapterRef] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    folders: set[tuple[int, int]] = field(default_factory=set)

    def add(self, name: str) -> None:
        path, there = Path(name), bool(name) and exists(name)
        if name.startswith(HF):
            self.refs.extend(_at(HubPath.parse(name)))
        elif name.startswith(HUB) and name != HUB:
            self.refs.extend(_on_hub(name))
        elif is_address(name):
            self._add_address(name)
        elif there and path.is_dir():
            self._add_folder(path)
        elif there and path.suffix == LIST:
            self._add_list(path)
        elif there:
            self.refs.append(AdapterRef(readable(name), path))
        elif REPOSITORY.fullmatch(name) and path.suffix not in (SAFETENSORS, LIST, *PICKLED):
            self.refs.extend(_on_hub(f"{HUB}{name}"))
        else:
            raise AdapterError(
                f"{readable(name)}: expected a file, folder, .txt list or repository on the Hub "
                f"({HUB}owner/name, or {HUB}owner for all of theirs), found none of that name",
                "missing",
            )

    def _add_list(self, file: Path) -> None:
        for name in _names(file.read_bytes()):
            try:
                # A list in a list is no adapter; following it might never end.
                if Path(name).suffix == LIST:
                    self.refs.append(AdapterRef.parse(name))
                else:
                    self.add(name)
            except (AdapterError, NotAvailableError) as error:
                self.refs.append(AdapterRef(readable(name), problem=error))

    def _add_folder(self, folder: Path) -> None:
        """Files in the order of their names; linked folders last, so that files keep their own."""
        links: list[Path] = []
        for root, folders, files in os.walk(folder, onerror=self._closed):
            if not self._enter(Path(root)):
                folders.clear()
                continue
            folders.sort()
            links += (path for name in folders if (path := Path(root, name)).is_symlink())
            for name in sorted(files):
                if _is_adapter(name):
                    file = Path(root, name)
                    self.refs.append(AdapterRef(readable(file), file))
                else:
                    self.left_out[OTHER_KIND] += 1
        for link in links:
            if _inode(link) in self.folders:
                self.left_out[SAME_FOLDER] += 1
            else:
                self._add_folder(link)

    def _add_address(self, address: str) -> None:
        """A file, or those of a folder in the order of their names; web servers list no folders."""
        if _is_adapter(path_of(address)) or address.startswith(WEB):
            self.refs.append(AdapterRef.parse(address))
            return
        found = sorted(files_below(address), key=_walked)
        if not found:
            raise AdapterError(f"{address}: expected a folder with adapters, found none", "missing")
        kept = [AdapterRef.parse(one) for one in found if _is_adapter(one)]
        self.left_out[OTHER_KIND] += len(found) - len(kept)
        self.refs.extend(kept)

    def _enter(self, folder: Path) -> bool:
        """Whether a folder is new."""
        new = _inode(folder) not in self.folders
        self.folders.add(_inode(folder))
        return new

    def _closed(self, _: OSError) -> None:
        self.left_out[CLOSED] += 1

    def each_once(self) -> Iterator[AdapterRef]:
        """Each file by one name, its own rather than that of a link."""
        kept: dict[Hashable, AdapterRef] = {}
        for ref in self.refs:
            identity = _identity(ref)
            first = kept.setdefault(identity, ref)
            if first.name == ref.name:
                continue
            self.left_out[SAME_FILE] += 1
            if _is_link(first) and not _is_link(ref):
                kept[identity] = ref
        yield from kept.values()


def _is_adapter(name: str) -> bool:
    """Whether a name is that of a file which is listed, be it to be refused."""
    return PurePosixPath(name).suffix.lower() in (SAFETENSORS, *PICKLED, *ARCHIVES)


def _walked(address: str) -> list[tuple[bool, str]]:
    """A file's place in the order of local folders: before the files of inner ones."""
    *folders, name = address.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def _identity(ref: AdapterRef) -> Hashable:
    """What two names of one file have in common."""
    try:
        file = ref.file()
        # The settings beside a PEFT file belong to it.
        return *_inode(file), file.parent.resolve() if file.name == PEFT_WEIGHTS else None
    except (AdapterError, OSError):
        return ref.name


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _is_link(ref: AdapterRef) -> bool:
    """Whether a link, to the file or to a folder above it, is part of a name."""
    return ref.path is not None and ref.path.resolve() != Path(
        os.path.normpath(ref.path.absolute())
    )


def _names(data: bytes) -> Iterator[str]:
    """The names in a list: whole lines, whatever editor or system wrote them."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    else:
        # Names on this machine need not be UTF-8.
        text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    for line in re.split(r"\r\n|\r|\n", text):
        bare = line.strip()
        quoted = bare[:1] in ("'", '"') and bare[:1] == bare[-1:]
        written = (line, bare, bare[1:-1] if quoted else bare)
        name = next(filter(exists, written), written[-1])
        if name and (not name.startswith("#") or exists(name)):
            yield name


def _at(place: HubPath) -> Iterator[AdapterRef]:
    """A file of a repository, or the adapters of a folder of it."""
    if PurePosixPath(place.path).suffix in (SAFETENSORS, *PICKLED):
        yield AdapterRef.parse(hub_name(place))
        return
    inside, found = f"{place.path}/".lstrip("/"), False
    for ref in _on_hub(hub_name(place._replace(path=""))):
        if ref.filename.startswith(inside):
            found = True
            yield ref
    if not found and inside:
        raise AdapterError(f"{hub_name(place)}: expected a folder with adapters", "missing")


def _on_hub(what: str) -> Iterator[AdapterRef]:
    address, _, revision = what.removeprefix(HUB).partition("@")
    if address.count("/") > 1:
        yield AdapterRef.parse(what)
        return
    for file in list_adapters(address, revision or None):
        name = f"{HUB}{file.repo_id}/{file.filename}"
        yield AdapterRef(name, None, file.repo_id, file.filename, file.revision)
