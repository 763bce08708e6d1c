"""The header of an untrusted safetensors file: read, and checked before anything is made of it.

The format is eight bytes of length, so many bytes of JSON, and the tensors' bytes. The checks are
those of the safetensors library, plus the bounds of `Limits`, duplicate names, and what files that
are no safetensors at all turn out to be. Only the header's bytes are read, so that a remote file
of gigabytes is judged by its first few thousand bytes.

Source: the format's description, https://github.com/huggingface/safetensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from lora_ws.adapters.source import Range, Source
from lora_ws.adapters.strict_json import check_structure, parse_value
from lora_ws.errors import AdapterError, shown

# What the format itself allows.
FORMAT_HEADER_BYTES = 100_000_000
METADATA = "__metadata__"
# Enough to tell what a file is that is no safetensors.
SNIFF_BYTES = 512
# What to do with a pickled file.
CONVERT = "if you trust it: `lora-ws convert FILE OUT --to diffusers --allow_pickle true`"
# Tensors of headers up to this length are remembered: those of SDXL take two thirds of it.
REMEMBERED_CHARACTERS = 1 << 19
# Brackets and commas of one tensor's entry, with its shape, and of the metadata.
TOKENS_A_TENSOR, TOKENS_OF_METADATA = 16, 100_000
BLANKS = " \t\n\r"
# Metadata where most writers put them, in front; and a tensor behind them.
METADATA_FIRST = re.compile(r'~\{~"__metadata__"~:~(?=\{)'.replace("~", f"[{BLANKS}]*"))
MORE = re.compile(rf'[{BLANKS}]*,[{BLANKS}]*(?=")')
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


class TensorInfo(NamedTuple):
    """One tensor: its type and shape, and where its bytes are within the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: key -> what and where, in the order of their bytes.
        metadata: the file's own words about itself: text by whoever made it, not facts.
        data_start: where the data part begins, in bytes from the start of the file.
        size: bytes of the whole file.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int

    def range_of(self, key: str) -> Range:
        """Where a tensor's bytes are, counted from the start of the file."""
        info = self.tensors[key]
        return self.data_start + info.start, self.data_start + info.stop


@dataclass(frozen=True)
class Limits:
    """How much of a file is believed; everything above is refused as ``too-large``.

    Attributes:
        header_bytes: length of the header; the format's own limit is 100 MB.
        tensors: how many.
        key_length: characters of a key.
        metadata_bytes: keys and values of the metadata, together, as UTF-8.
        dims: dimensions of a tensor.
        elements: numbers in a tensor, and the size of each dimension.
        total_bytes: the data part.
        factor_bytes: the factors that an adapter's tensors are made into, as float32.
        cpu_seconds: what reading them and measuring their update takes, about.
    """

    header_bytes: int = 32_000_000
    tensors: int = 100_000
    key_length: int = 1024
    metadata_bytes: int = 8_000_000
    dims: int = 8
    elements: int = 2**28
    total_bytes: int = 4 * 2**30
    factor_bytes: int = 4 * 2**30
    cpu_seconds: float = 60.0


LIMITS = Limits()


def read_header(source: Source, limits: Limits = LIMITS) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        source: the file; only its first bytes are read.
        limits: what to refuse that the format allows.

    Raises:
        AdapterError: the file is not safetensors, breaks the format, does not have the size that
            its header promises, or is above a limit. ``reason`` says which.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from safetensors.numpy import save
        >>> from lora_ws.adapters.source import LocalSource
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.safetensors"
        ...     _ = file.write_bytes(save({"a": np.ones((2, 3), np.float16)}))
        ...     read_header(LocalSource(file)).tensors
        {'a': TensorInfo(dtype='F16', shape=(2, 3), start=0, stop=12)}
    """
    (start,) = source.read([(0, min(SNIFF_BYTES, source.size))])
    try:
        length = _header_length(start, source.size, limits)
    except AdapterError as error:
        raise AdapterError(f"{source.name}: {error}", error.reason) from None
    (raw,) = source.read([(8, 8 + length)])
    try:
        tensors, end, metadata = _parse(raw, limits)
        _check_end(end, source.size - 8 - length, limits)
    except AdapterError as error:
        raise AdapterError(f"{source.name}: {error}", error.reason) from error.__cause__
    return Header(tensors, metadata or {}, 8 + length, source.size)


def _refuse(reason: str, message: str) -> NoReturn:
    raise AdapterError(message, reason)


def _header_length(start: bytes, size: int, limits: Limits) -> int:
    if not size:
        _refuse("empty", "expected a safetensors file, got an empty one; download it again")
    length = int.from_bytes(start[:8], "little")
    looks_right = start[8:].lstrip(b" \t\r\n")[:1] in (b"{", b"[")
    if not looks_right:
        _recognise(start)
    most = min(limits.header_bytes, FORMAT_HEADER_BYTES)
    if length > most:
        _refuse("too-large", f"expected a header of at most {most} bytes, got one of {length}")
    if 8 + length > size:
        _refuse(
            "truncated",
            f"expected a header of {length} bytes, got a file of {size}; download it again",
        )
    return length


def _recognise(start: bytes) -> NoReturn:
    """Say what it is instead of safetensors."""
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        _refuse(
            "lfs-pointer",
            "expected a safetensors file, got a Git LFS pointer to one; run `git lfs pull`, or "
            "download the file itself",
        )
    if text.startswith(b"<"):
        _refuse(
            "html",
            "expected a safetensors file, got a web page; use the address of the download, and "
            "log in where it asks for it",
        )
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if start.startswith(b"PK\x03\x04") or pickled:
        _refuse(
            "pickle",
            "expected a safetensors file, got a pickled one, which can run code when opened; "
            + CONVERT,
        )
    _refuse(
        "unreadable",
        "expected a safetensors file, got something else; check that it is one, or download it "
        "again",
    )


class _Parsed(NamedTuple):
    """Tensors, where the last one ends, and the metadata, where they stand with them."""

    tensors: Mapping[str, TensorInfo]
    end: int
    metadata: Mapping[str, str] | None


def _parse(raw: bytes, limits: Limits) -> _Parsed:
    """Parse a header, but for tensors that an earlier one had too.

    Files of one recipe have the same tensors, and metadata of their own in front of them.
    """
    check_structure(raw, limits.tensors * TOKENS_A_TENSOR + TOKENS_OF_METADATA)
    try:
        metadata, rest = _split_metadata(raw.decode("utf-8"))
        parse = _tensors_again if len(rest) <= REMEMBERED_CHARACTERS else _tensors
        parsed = parse(rest, limits)
    except AdapterError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"expected a header of valid JSON, got {error}", "header") from error
    if metadata is None:
        return parsed
    if parsed.metadata is not None:
        _refuse("header", f"expected each name once, got {shown(METADATA)} twice")
    return parsed._replace(metadata=_metadata(metadata, limits))


def _split_metadata(text: str) -> tuple[Any, str]:
    """Metadata that stand first, and the text of an object of all else; or None, and all of it."""
    if first := METADATA_FIRST.match(text):
        metadata, end = parse_value(text, first.end())
        if more := MORE.match(text, end):
            return metadata, "{" + text[more.end() :]
    return None, text


def _tensors(text: str, limits: Limits) -> _Parsed:
    data, end = parse_value(text, len(text) - len(text.lstrip(BLANKS)))
    if text[end:].strip(BLANKS):
        _refuse("header", "expected a header of valid JSON, got more behind it")
    if not isinstance(data, dict):
        _refuse("header", f"expected a header that is a JSON object, got a {type(data).__name__}")
    metadata = _metadata(data.pop(METADATA), limits) if METADATA in data else None
    if len(data) > limits.tensors:
        _refuse("too-large", f"expected at most {limits.tensors} tensors, got {len(data)}")
    tensors = {key: _tensor(key, info, limits) for key, info in data.items()}
    order = sorted(tensors, key=lambda key: (tensors[key].start, tensors[key].stop))
    tensors = {key: tensors[key] for key in order}
    return _Parsed(tensors, _covered(tensors), metadata)


_tensors_again = lru_cache(maxsize=16)(_tensors)


def _metadata(found: Any, limits: Limits) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        _refuse("header", f"expected {METADATA} to be an object, got a {type(found).__name__}")
    total = 0
    for key, value in found.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            _refuse("header", f"expected text in {METADATA}, got a {kind} for {shown(key)}")
        total += len(key.encode()) + len(value.encode())
    if total > limits.metadata_bytes:
        _refuse(
            "too-large",
            f"expected at most {limits.metadata_bytes} bytes of metadata, got {total}",
        )
    return found


def _tensor(key: str, info: Any, limits: Limits) -> TensorInfo:
    if len(key) > limits.key_length:
        _refuse(
            "too-large",
            f"expected keys of at most {limits.key_length} characters, got one of {len(key)}",
        )
    if not isinstance(info, dict) or not info.keys() >= {"dtype", "shape", "data_offsets"}:
        _refuse("header", f"{shown(key)}: expected dtype, shape and data_offsets, got less")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse("dtype", f"{shown(key)}: expected a known dtype, got {shown(str(dtype))}")
    for name, value in (("shape", shape), ("data_offsets", offsets)):
        # True is an int to Python.
        if not isinstance(value, list) or not {*map(type, value)} <= {int}:
            got = shown(str(value))
            _refuse("header", f"{shown(key)}: expected {name} of whole numbers, got {got}")
    if len(offsets) != 2:
        _refuse("header", f"{shown(key)}: expected two data_offsets, got {len(offsets)}")
    start, stop = offsets
    bits = _elements(key, shape, limits) * BITS[dtype]
    if bits % 8 or stop - start != bits // 8:
        _refuse(
            "layout",
            f"{shown(key)}: expected {bits / 8:g} bytes for {dtype} of shape {tuple(shape)}, got "
            f"data_offsets {start} to {stop}",
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _elements(key: str, shape: list[int], limits: Limits) -> int:
    if len(shape) > limits.dims:
        _refuse(
            "too-large",
            f"{shown(key)}: expected at most {limits.dims} dimensions, got {len(shape)}",
        )
    elements = 1
    for size in shape:
        # Each size too: a tensor without numbers can still have a side of 2**60.
        elements *= size
        if max(size, elements) > limits.elements:
            _refuse(
                "too-large",
                f"{shown(key)}: expected at most {limits.elements} numbers, got shape "
                f"{tuple(shape)}",
            )
    return elements


def _covered(tensors: Mapping[str, TensorInfo]) -> int:
    """Where tensors end that lie one after the other from 0; others are refused."""
    end = 0
    for key, info in tensors.items():
        if info.start != end:
            kind = "a hole" if info.start > end else "an overlap"
            _refuse(
                "layout",
                f"{shown(key)}: expected its bytes to begin at {end}, got {kind}: {info.start}",
            )
        end = info.stop
    return end


def _check_end(end: int, data_size: int, limits: Limits) -> None:
    """The tensors end where the file does."""
    if end > limits.total_bytes:
        _refuse("too-large", f"expected at most {limits.total_bytes} bytes, got {end}")
    if end != data_size:
        reason = "truncated" if end > data_size else "trailing"
        _refuse(
            reason,
            f"expected {end} bytes after the header, got {data_size}; "
            + ("the download may be incomplete" if end > data_size else "cut what follows"),
        )
