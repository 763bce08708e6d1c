"""Safetensors files put together by hand, well or badly, and what the library says about them."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from lora_ws.adapters.header import LIMITS, Header, Limits, read_header
from lora_ws.adapters.source import LocalSource

# numpy's names of what the library hands out as bytes.
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
PLAIN |= {"I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}


def pack(header: Any, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Key -> dtype, shape and bytes, as the safetensors library reads them; None if it refuses."""
    try:
        found = deserialize(data)
    except SafetensorError:
        return None
    return {key: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for key, v in found}


def ours(tmp_path: Path, data: bytes, limits: Limits = LIMITS) -> Header:
    file = tmp_path / "file.safetensors"
    file.write_bytes(data)
    return read_header(LocalSource(file), limits)


def same_header(header: Header, theirs: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bool:
    mine = {key: (i.dtype, i.shape, i.stop - i.start) for key, i in header.tensors.items()}
    return mine == {key: (d, shape, len(data)) for key, (d, shape, data) in theirs.items()}


def widened(dtype: str, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    """The library's bytes as float32, by numpy and torch."""
    if dtype in PLAIN:
        with np.errstate(over="ignore"):
            return np.frombuffer(data, PLAIN[dtype]).astype(np.float32).reshape(shape)
    import torch

    types = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "BOOL": torch.bool}
    types |= {"F8_E5M2": torch.float8_e5m2}
    if not data:
        return np.zeros(shape, np.float32)
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if dtype == "BOOL":
        values = values.ne(0)
    return values.view(types[dtype]).to(torch.float32).numpy().reshape(shape)
