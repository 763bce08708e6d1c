"""Addresses of fsspec, ``s3://bucket/file``: what they name, and their file systems."""

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_ws.errors import NotAvailableError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
WEB = ("http://", "https://")
# Kinds of addresses that an extra of ours serves.
EXTRAS = {"s3": "s3", "s3a": "s3"}


def is_address(name: object) -> bool:
    """Whether a name is an address, and not a path.

    Example:
        >>> is_address("s3://bucket/a.safetensors"), is_address("folder/a.safetensors")
        (True, False)
    """
    return ADDRESS.match(str(name)) is not None


def place(name: str | Path) -> str | Path:
    """A file to write: an address as it is, anything else as a path.

    Example:
        >>> place("s3://bucket/a.json")
        's3://bucket/a.json'
    """
    return str(name) if is_address(name) else Path(name)


def path_of(address: str) -> str:
    """What names a file in an address: without what a web server is asked beside it.

    Example:
        >>> path_of("https://host/a.safetensors?token=1"), path_of("s3://bucket/b?.bin")
        ('host/a.safetensors', 'bucket/b?.bin')
    """
    path = ADDRESS.sub("", address)
    return re.split("[?#]", path)[0] if address.startswith(WEB) else path


def beside(address: str, name: str) -> str:
    """The address of a file in the same folder.

    Example:
        >>> beside("https://host/a.safetensors?token=1", "b.json")
        'https://host/b.json?token=1'
    """
    path = path_of(address)
    head, _, rest = address.rpartition(path)
    return head + str(PurePosixPath(path).with_name(name)) + rest


def file_system(address: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of an address, and the path in it; fsspec finds settings and logins.

    Raises:
        NotAvailableError: there is none of this kind, or it needs a package.

    Example:
        >>> file_system("memory://folder/a.safetensors")[1]
        '/folder/a.safetensors'
    """
    from fsspec.core import url_to_fs

    match = ADDRESS.match(address)
    kind = match[1] if match else ""
    if not match or "::" in address:
        raise NotAvailableError(f"{address}: expected one address, such as s3://bucket/folder")
    try:
        # A listing that is kept would hide that a file changed.
        return url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        extra = f"pip install 'lora_ws[{EXTRAS[kind]}]'" if kind in EXTRAS else str(error)
        raise NotAvailableError(f"{address}: {kind}:// needs a package: {extra}") from error
    except ValueError as error:
        raise NotAvailableError(f"{address}: cannot be read ({error}); check it") from error


def files_below(address: str) -> list[str]:
    """The addresses of all files in a folder and the folders in it.

    Raises:
        NotAvailableError: its server cannot be reached, or refuses.

    Example:
        >>> file_system("memory://")[0].pipe("/folder/inner/a.txt", b"")
        >>> files_below("memory://folder/inner")
        ['memory:///folder/inner/a.txt']
    """
    system, path = file_system(address)
    try:
        return [str(system.unstrip_protocol(one)) for one in system.find(path)]
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise NotAvailableError(f"{address}: cannot be listed ({why}); check it") from error


def within(system: "AbstractFileSystem", seconds: float) -> dict[str, Any]:
    """What gives up a call of a file system after some time, where it can."""
    return {"timeout": seconds} if system.async_impl else {}
