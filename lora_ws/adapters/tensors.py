"""Some tensors of a checked file, as float32 arrays."""

import math
from collections.abc import Iterable

import numpy as np

from lora_ws.adapters.header import Header, TensorInfo, shown
from lora_ws.adapters.source import Source
from lora_ws.errors import AdapterError

# bfloat16 and float8 have no numpy type; they are widened, exactly, below.
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
}


def read_tensors(source: Source, header: Header, names: Iterable[str]) -> dict[str, np.ndarray]:
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
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in header.tensors:
            raise AdapterError(f"{source.name}: holds no tensor {shown(name)}", "incomplete")
        dtype = header.tensors[name].dtype
        if dtype not in NUMPY and dtype not in WIDEN:
            raise AdapterError(
                f"{source.name}: {shown(name)} is of type {dtype}, which is not read; expected one "
                f"of {', '.join([*NUMPY, *WIDEN])}: convert the file",
                "dtype",
            )
    parts = source.read([header.range_of(name) for name in chosen])
    found = {}
    # What does not fit float32, or its square, is found out below.
    with np.errstate(over="ignore", invalid="ignore"):
        for name, part in zip(chosen, parts, strict=True):
            found[name] = _decode(part, header.tensors[name])
            if not _is_finite(found[name]):
                raise AdapterError(
                    f"{source.name}: {shown(name)} holds NaN or infinite values, or some beyond "
                    "float32; the training went wrong, or the file is damaged",
                    "not-finite",
                )
    return found


def _is_finite(values: np.ndarray) -> bool:
    # What is not finite stays so in a sum of squares, which is cheaper than a look at each.
    flat = values.ravel()
    return math.isfinite(flat.dot(flat)) or bool(np.isfinite(flat).all())


def _decode(part: bytes, info: TensorInfo) -> np.ndarray:
    if info.dtype in WIDEN:
        values = WIDEN[info.dtype](part)
    else:
        values = np.frombuffer(part, NUMPY[info.dtype]).astype(np.float32, copy=False)
    values.flags.writeable = False
    return values.reshape(info.shape)


def _bool(part: bytes) -> np.ndarray:
    # Any byte but 0 is true; numpy's bool leaves open what a 2 is.
    return (np.frombuffer(part, np.uint8) != 0).astype(np.float32)


def _bfloat16(part: bytes) -> np.ndarray:
    # The upper half of a float32.
    wide = np.frombuffer(part, "<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _float8_e5m2(part: bytes) -> np.ndarray:
    # The upper half of a float16.
    wide = (np.frombuffer(part, np.uint8).astype(np.uint16) << 8).view(np.float16)
    return wide.astype(np.float32)


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
WIDEN = {"BOOL": _bool, "BF16": _bfloat16, "F8_E4M3": _float8_e4m3, "F8_E5M2": _float8_e5m2}
