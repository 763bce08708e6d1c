"""Some tensors of a checked file, as float32 arrays."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_ws.adapters.header import Header, shown
from lora_ws.adapters.source import Source
from lora_ws.errors import AdapterError

# bfloat16 and float8 have no numpy type, and float16 is slow; they are widened, exactly, below.
# Tensors are decoded together up to so many bytes.
RUN_BYTES = 1 << 24
# Numbers that are widened while a cache holds them.
BLOCK = 1 << 16
# Of a float16, in place.
LARGEST_EXPONENT = 0x7C00
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
}


class Tensors(dict[str, np.ndarray]):
    """Tensors by key.

    Attributes:
        norm: root of the sum of squares of all, in float32; infinite where that is too large.
    """

    norm = 0.0


def read_tensors(source: Source, header: Header, names: Iterable[str]) -> Tensors:
    """Read some tensors of a file.

    Args:
        source: the file that the header is of.
        header: its checked header.
        names: which tensors; only their bytes are asked of the source.

    Returns:
        key -> float32 of the stored shape. Widened exactly from narrower floats; float64 and large
        whole numbers are rounded. Those stored as float32 are not copied. All are read-only.

    Raises:
        AdapterError: no such tensor, numbers of a type that is not read (``dtype``), or values
            that are not finite in float32 (``not-finite``).

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from safetensors.numpy import save
        >>> from lora_ws.adapters.header import read_header
        >>> from lora_ws.adapters.source import LocalSource
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.safetensors"
        ...     _ = file.write_bytes(save({"a": np.arange(3, dtype=np.float16)}))
        ...     source = LocalSource(file)
        ...     read_tensors(source, read_header(source), ["a"])
        {'a': array([0., 1., 2.], dtype=float32)}
    """
    runs = _runs(source.name, header, dict.fromkeys(names))
    begin = header.data_start
    parts = source.read([(begin + run.start, begin + run.stop) for run in runs])
    found = Tensors()
    # What does not fit float32, or its square, is found out below.
    with np.errstate(over="ignore", invalid="ignore"):
        for run, part in zip(runs, parts, strict=True):
            values = _decode(part, run.dtype)
            square = float(values.dot(values))
            # What is not finite stays so in a sum of squares, which is cheaper than a look at each.
            finite = math.isfinite(square)
            found.norm = math.hypot(found.norm, math.sqrt(square))
            # Bytes a number; of tensors without numbers none.
            width = max(1, len(part) // max(1, len(values)))
            for name in run.names:
                _, shape, start, stop = header.tensors[name]
                at = (start - run.start) // width
                found[name] = values[at : at + (stop - start) // width].reshape(shape)
                if not finite and not np.isfinite(found[name]).all():
                    raise AdapterError(
                        f"{source.name}: {shown(name)} holds NaN or infinite values, or some "
                        "beyond float32; the training went wrong, or the file is damaged",
                        "not-finite",
                    )
    return found


@dataclass
class _Run:
    """Tensors of one type that lie one after the other, which are decoded at once."""

    dtype: str
    start: int
    stop: int
    names: list[str]


def _runs(file: str, header: Header, names: Mapping[str, None]) -> list[_Run]:
    if lost := next(iter(names.keys() - header.tensors.keys()), None):
        raise AdapterError(f"{file}: holds no tensor {shown(lost)}", "incomplete")
    runs: list[_Run] = []
    last = _Run("", 0, -1, [])
    # In the order of their bytes.
    for name, (dtype, _, start, stop) in header.tensors.items():
        if name not in names:
            continue
        if dtype == last.dtype and start == last.stop and stop - last.start <= RUN_BYTES:
            last.stop = stop
            last.names.append(name)
            continue
        if dtype not in NUMPY and dtype not in WIDEN:
            raise AdapterError(
                f"{file}: {shown(name)} is of type {dtype}, which is not read; expected one of "
                f"{', '.join([*NUMPY, *WIDEN])}: convert the file",
                "dtype",
            )
        last = _Run(dtype, start, stop, [name])
        runs.append(last)
    return runs


def _decode(part: bytes, dtype: str) -> np.ndarray:
    if dtype in WIDEN:
        values = WIDEN[dtype](part)
    else:
        values = np.frombuffer(part, NUMPY[dtype]).astype(np.float32, copy=False)
    values.flags.writeable = False
    return values


def _bool(part: bytes) -> np.ndarray:
    # Any byte but 0 is true; numpy's bool leaves open what a 2 is.
    return (np.frombuffer(part, np.uint8) != 0).astype(np.float32)


def _float16(part: bytes) -> np.ndarray:
    # Sign, exponent and mantissa where float32 has them; the exponents' offsets differ by 112.
    narrow = np.frombuffer(part, "<i2")
    wide = np.empty(narrow.size, np.int32)
    # Infinite and NaN have the largest exponent.
    for start in range(0, narrow.size, BLOCK):
        few, bits = narrow[start : start + BLOCK], wide[start : start + BLOCK]
        if (few & 0x7FFF).max() >= LARGEST_EXPONENT:
            return narrow.view("<f2").astype(np.float32)
        bits[:] = few
        bits <<= 13
        bits &= ~0x7000_0000
        floats = bits.view(np.float32)
        floats *= np.float32(2.0**112)
    return wide.view(np.float32)


def _bfloat16(part: bytes) -> np.ndarray:
    # The upper half of a float32.
    wide = np.frombuffer(part, "<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _float8_e5m2(part: bytes) -> np.ndarray:
    # The upper half of a float16.
    wide = np.frombuffer(part, np.uint8).astype(np.uint16) << 8
    return wide.view(np.float16).astype(np.float32)


def _float8_e4m3(part: bytes) -> np.ndarray:
    return _E4M3[np.frombuffer(part, np.uint8)]


def _e4m3_table() -> np.ndarray:
    """Every float8 of 4 bits of exponent, bias 7, and 3 of mantissa, without infinities."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10))
    size[codes & 127 == 127] = np.nan
    return np.copysign(size, 127.5 - codes).astype(np.float32)


_E4M3 = _e4m3_table()
WIDEN = {
    "F16": _float16,
    "BF16": _bfloat16,
    "F8_E4M3": _float8_e4m3,
    "F8_E5M2": _float8_e5m2,
    "BOOL": _bool,
}
