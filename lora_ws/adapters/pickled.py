"""Pickled adapters (``.bin``, ``.pt``), opened on request only, in a process of their own.

A pickle is a program. torch's ``weights_only`` runs a part of it that is meant to be harmless, and
has had holes; so the program runs in a process with little memory and time, and what comes back is
a safetensors file, which is then checked like any other.
"""

import multiprocessing
import os
import sys
import zipfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from lora_ws.adapters.header import read_header, shown
from lora_ws.adapters.source import LocalSource
from lora_ws.errors import AdapterError

Holds = Literal["tensors", "matrix", "dimensions"]
HOLDS = {
    "tensors": "a dictionary of tensors",
    "matrix": "a matrix",
    "dimensions": "a dictionary of shapes",
}
# Before 2.10, weights_only could be made to overwrite memory, and before 2.6 to run code.
TORCH = (2, 10)
MEMBERS, RATIO = 100_000, 20
ENTRIES, DEPTH = 100_000, 16
# Bytes of the child's last words that are listened to.
WORDS = 2000
# Bytes that the child may use to say what went wrong.
SPARE = 64 << 20


def convert_pickle(
    file: str | Path,
    out: str | Path,
    *,
    memory_mb: int = 2048,
    seconds: float = 60,
    holds: Holds = "tensors",
) -> Path:
    """Write the tensors of a pickled adapter as a safetensors file.

    This runs a stranger's pickle in a process with limited memory and time, but with your rights:
    no sandbox. Do it for files that you would also open in the program they were made for.

    Args:
        file: what ``torch.save`` wrote: a dictionary of tensors, possibly nested.
        out: the safetensors file to write; one that is there is replaced. Keys of nested
            dictionaries are joined by dots; whatever is no tensor is left out.
        memory_mb: memory for the content, in MiB, beside torch itself.
        seconds: time for everything, with the start of torch.
        holds: what the file is expected to hold: tensors; a single ``matrix``, which gets this
            name; or ``dimensions``, a dictionary of shapes, each of which becomes its place in the
            dictionary and its sizes.

    Returns:
        ``out``.

    Raises:
        AdapterError: with reason ``pickle``, whatever went wrong; ``missing`` without a file.

    Example:
        >>> convert_pickle("no.bin", "a.safetensors")
        Traceback (most recent call last):
        lora_ws.errors.AdapterError: no.bin: expected a file, got none...
    """
    file, out = Path(file), Path(out)
    with LocalSource(file) as source:
        size = source.size
    if size > memory_mb << 20:
        raise _error(file, f"expected at most {memory_mb} MiB, got {size >> 20}; raise memory_mb")
    if sys.platform != "linux":
        raise _error(file, "expected Linux, where memory can be limited; convert it there")
    _check_zip(file, memory_mb << 20)
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _in_child(file, draft, memory_mb, seconds, holds)
        with LocalSource(draft) as source:
            header = read_header(source)
        if not header.tensors:
            raise _error(file, "expected a dictionary of tensors, got none; is it an adapter?")
        draft.replace(out)
    except OSError as error:
        raise _error(file, f"{out} cannot be written ({error})") from error
    except AdapterError as error:
        if error.reason == "pickle":
            raise
        raise _error(file, f"its tensors are refused: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return out


def _error(file: Path, message: str) -> AdapterError:
    return AdapterError(f"{file}: {message}", reason="pickle")


def _check_zip(file: Path, most: int) -> None:
    """Refuse an archive that would grow, before anything unpacks it."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _error(file, f"expected a torch archive, got a damaged one ({error})") from error
    total = sum(member.file_size for member in members)
    grown = total > RATIO * file.stat().st_size
    if len(members) > MEMBERS or total > most or grown:
        raise _error(
            file,
            f"expected at most {MEMBERS} members, {most >> 20} MiB and {RATIO} times the packed "
            f"size, got {len(members)} members of {total >> 20} MiB in a file of "
            f"{file.stat().st_size} bytes",
        )


def _in_child(file: Path, draft: Path, memory_mb: int, seconds: float, holds: Holds) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(file, draft, memory_mb, seconds, holds, theirs))
    child.start()
    theirs.close()
    child.join(seconds)
    late = child.is_alive()
    child.kill()
    child.join()
    with ours:
        words = _last_words(ours)
    if late:
        raise _error(file, f"expected to be done in {seconds:g} seconds, got no end; stopped")
    if child.exitcode:
        raise _error(file, words or f"its process ended with code {child.exitcode}; refused")


def _last_words(connection: Connection) -> str:
    # Raw bytes: unpickling what the child says would undo what it is there for.
    try:
        words = connection.recv_bytes(WORDS) if connection.poll() else b""
    except (OSError, EOFError):
        return ""
    return words.decode("utf-8", "replace")


def _child(
    file: Path, draft: Path, memory_mb: int, seconds: float, holds: Holds, words: Connection
) -> None:
    import resource

    try:
        _convert(file, draft, memory_mb << 20, seconds, holds)
    except BaseException as error:
        # Saying so needs memory too.
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        text = str(error).splitlines() or [""]
        kind = "" if isinstance(error, AdapterError) else f"{type(error).__name__}: "
        message = f"expected {HOLDS[holds]}, got {kind}{shown(text[0]).strip('`')}"
        words.send_bytes(message.encode("utf-8", "replace")[:WORDS])
        os._exit(1)


def _convert(file: Path, draft: Path, memory: int, seconds: float, holds: Holds) -> None:
    import resource

    import torch
    from safetensors.torch import save_file

    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        raise AdapterError(f"torch {torch.__version__}, which is not safe; install 2.10 or newer")
    # What torch itself has mapped does not count.
    mapped = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        * resource.getpagesize()
    )
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory + SPARE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # By its name, torch would take a misnamed one for safetensors.
    with file.open("rb") as opened:
        data = torch.load(opened, map_location="cpu", weights_only=True)
    tensors: dict[str, torch.Tensor] = {}
    total = 0
    for key, tensor in {"tensors": _tensors, "matrix": _matrix, "dimensions": _shapes}[holds](data):
        total += tensor.numel() * tensor.element_size()
        # A tensor may repeat one number without end.
        if total > memory:
            raise AdapterError(f"more than {memory >> 20} MiB of tensors; raise memory_mb")
        if tensor.layout is not torch.strided or tensor.is_quantized or key in tensors:
            raise AdapterError(f"{key}, which is twice there, sparse or quantised")
        tensors[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    save_file(tensors, draft)


def _matrix(data: Any) -> Iterator[tuple[str, Any]]:
    import torch

    if not isinstance(data, torch.Tensor):
        raise AdapterError(f"a {type(data).__name__}")
    yield "matrix", data


def _shapes(data: Any) -> Iterator[tuple[str, Any]]:
    """Shapes of a dictionary, each behind its place: of ``name: shape`` or ``name: (_, shape)``."""
    import torch

    if not isinstance(data, dict) or not 0 < len(data) <= ENTRIES:
        raise AdapterError(f"a {type(data).__name__}, or too many entries")
    for place, (name, shape) in enumerate(data.items()):
        last = shape[-1] if isinstance(shape, list | tuple) and len(shape) else shape
        sizes = last if isinstance(last, list | tuple) else shape
        if not isinstance(sizes, list | tuple) or not all(type(n) is int and n > 0 for n in sizes):
            raise AdapterError(f"{name}, which is no shape")
        yield str(name), torch.tensor([place, *sizes], dtype=torch.int64)


def _tensors(data: Any) -> Iterator[tuple[str, Any]]:
    """Tensors of nested dictionaries, which may also hold each other or themselves."""
    import torch

    if isinstance(data, torch.Tensor):
        raise AdapterError("a single tensor; if its rows are adapters, name their --dimensions")
    stack: list[tuple[str, Any, int]] = [("", data, 0)]
    seen = 0
    while stack:
        prefix, value, depth = stack.pop()
        if isinstance(value, torch.Tensor):
            yield prefix, value
        elif isinstance(value, dict):
            seen += len(value)
            if seen > ENTRIES or depth > DEPTH:
                raise AdapterError(f"more than {ENTRIES} entries or {DEPTH} levels")
            dot = "." if prefix else ""
            stack += [(f"{prefix}{dot}{key}", value[key], depth + 1) for key in value]
