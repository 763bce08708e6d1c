"""Collections at addresses of fsspec, ``s3://bucket/folder``: copied once, then read from disk.

Rows are mapped to memory, which takes a file on this machine.
"""

import hashlib
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from lora_ws import hub
from lora_ws.adapters.addressed import MARKS, may_pass
from lora_ws.adapters.remote import PATIENCE, SILENCE, SLOWEST
from lora_ws.addresses import WEB, file_system, is_address, path_of, within
from lora_ws.config import cache_dir
from lora_ws.errors import NotAvailableError
from lora_ws.journal import locked, replacing
from lora_ws.report.progress import progress


def on_disk(name: str | Path) -> Path:
    """A path as it is; of an address, other than of the Hub, where its copy is.

    Args:
        name: path or address of a file or a folder.

    Raises:
        NotAvailableError: see `local_copy`.

    Example:
        >>> on_disk("folder/store").parts
        ('folder', 'store')
    """
    return local_copy(str(name)) if is_away(name) else Path(name)


def is_away(name: str | Path) -> bool:
    """Whether a name is an address, other than of the Hub, which has its own way.

    Example:
        >>> is_away("s3://bucket/store"), is_away("hf://datasets/owner/name"), is_away("store")
        (True, False, False)
    """
    return is_address(name) and not str(name).startswith(hub.HF)


def local_copy(address: str) -> Path:
    """Copy the files at an address into the cache, unless they are there as they are now.

    A copy that was cut off goes on with the files that are missing.

    Args:
        address: of a file or a folder; of a web server, of a file.

    Returns:
        The file or the folder, under its own name.

    Raises:
        NotAvailableError: nothing is there, its server cannot be reached, refuses, sends other
            bytes than it announces, or files change while they are copied.

    Example:
        >>> file_system("memory://")[0].pipe("/folder/rows/a.csv", b"a,b")
        >>> copy = local_copy("memory://folder/rows")
        >>> copy.name, (copy / "a.csv").read_text(encoding="utf-8")
        ('rows', 'a,b')
    """
    sizes, state = _listed(address)
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    name = PurePosixPath(path_of(address)).name
    copy = cache_dir() / "addresses" / key / name
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    with locked(copy.parent.with_suffix(".lock")):
        if not copy.exists():
            partial = copy.parent.with_suffix(".partial")
            with progress(f"copy {address}", len(sizes)) as advance:
                for path, size in sizes.items():
                    _fetch(address, path, size, partial / path)
                    advance(1)
            if _listed(address)[1] != state:
                shutil.rmtree(partial)
                raise NotAvailableError(
                    f"{address}: files changed while they were copied; try again when it is whole"
                )
            partial.rename(copy)
    return copy


def _listed(address: str) -> tuple[dict[str, int], str]:
    """Sizes of all files, by path below the address, and what changes when one of them does."""
    system, path = file_system(address)
    try:
        ask = within(system, SILENCE)
        if address.startswith(WEB):
            infos = {path: hub.insist(lambda: system.info(path, **ask), may_pass)}
        else:
            infos = hub.insist(lambda: dict(system.find(path, detail=True)), may_pass)
    except Exception as error:
        raise _not_there(address, error) from error
    home = path.rstrip("/")
    found: dict[str, dict[str, Any]] = {
        name.removeprefix(home).strip("/"): info for name, info in sorted(infos.items())
    }
    if not found:
        raise NotAvailableError(f"{address}: expected a file or a folder, found none; check it")
    for name, info in found.items():
        if ".." in PurePosixPath(name).parts or not isinstance(info.get("size"), int):
            raise NotAvailableError(
                f"{address}: expected files of known size inside the folder, got {name!r} of "
                f"{info.get('size')}"
            )
    marks = [[n, i["size"], *(str(i[m]) for m in MARKS if i.get(m))] for n, i in found.items()]
    return {name: info["size"] for name, info in found.items()}, json.dumps([address, marks])


def _fetch(address: str, name: str, size: int, target: Path) -> None:
    """Copy one file, unless it was copied before the copy was cut off."""
    if target.is_file() and target.stat().st_size == size:
        return
    system, path = file_system(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = "/".join(filter(None, [path.rstrip("/"), name]))
    limit = within(system, PATIENCE + size / SLOWEST)
    with replacing(target) as file:

        def get() -> None:
            # A client that asks again may add to what it has.
            file.unlink(missing_ok=True)
            system.get_file(whole, str(file), **limit)
            if (got := file.stat().st_size) != size:
                raise OSError(f"expected {size} bytes of {name or 'the file'}, got {got}")

        try:
            hub.insist(get, may_pass)
        except Exception as error:
            raise _not_there(address, error) from error


def _not_there(address: str, error: Exception) -> NotAvailableError:
    return NotAvailableError(
        f"{address}: cannot be read ({type(error).__name__}: {error}); check it, and your login"
    )
