"""Spoilt safetensors files by the thousand, read by us and by the library, in a bounded process.

``python fuzz_safetensors.py CASES SEED [FILE...]`` spoils small files made here and parts of the
given ones. Each must be read as the library reads it, or be refused by an AdapterError; it prints
how often what happened, as JSON. ``bombs`` reads headers made to cost much instead. Memory is
limited to MEMORY beyond the libraries', and time to SECONDS per case.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from factories import SMALL, matrices, weights
from raw_safetensors import entry, library, pack, same_header, widened
from safetensors.torch import load_file, save

from lora_ws.adapters.header import read_header
from lora_ws.adapters.source import Range, Source
from lora_ws.adapters.tensors import NUMPY, WIDEN, read_tensors
from lora_ws.errors import REASONS, AdapterError

T = TypeVar("T")
MEMORY = 512 << 20
SECONDS = 20
# What we may refuse though the library reads it, and how we then say so.
STRICTER = ("too-large", "not-finite")
WORDS = ("twice", "nested brackets", "expected dtype, shape and data_offsets", "a known dtype")


class Memory(Source):
    """A file that is nowhere."""

    def __init__(self, data: bytes) -> None:
        self.data, self.name, self.bytes_read = data, "case", 0

    def _size(self) -> int:
        return len(self.data)

    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        return [self.data[start:stop] for start, stop in ranges]


def attempt(call: Callable[[], T]) -> T | AdapterError:
    try:
        return call()
    except AdapterError as error:
        return error


def judge(data: bytes) -> str:
    """What became of a file, in one word; raises AssertionError where it must not."""
    theirs = library(data)
    source = Memory(data)
    header = attempt(lambda: read_header(source))
    if isinstance(header, AdapterError):
        assert header.reason in REASONS
        known = header.reason in STRICTER or any(words in str(header) for words in WORDS)
        assert theirs is None or known, f"only we refuse it: {header}"
        return header.reason if theirs is None else f"stricter: {header.reason}"
    assert theirs is not None, "only we read it"
    assert same_header(header, theirs)
    outcome = "read"
    for key, (dtype, shape, raw) in theirs.items():
        expected = widened(dtype, shape, raw) if dtype in {*NUMPY, *WIDEN} else None
        found = attempt(lambda key=key: read_tensors(source, header, [key])[key])
        if isinstance(found, AdapterError):
            right = "dtype" if expected is None else "not-finite"
            assert found.reason == right
            assert expected is None or not np.isfinite(expected).all()
            outcome = f"stricter: {right}"
        else:
            assert expected is not None
            assert found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()
    return outcome


def bases(files: Sequence[str]) -> list[bytes]:
    """Small good files of several types and spellings, and the first tensors of the given ones."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        named = {k: torch.tensor(v).to(dtype) for k, v in matrices(weights(1)[0], SMALL).items()}
        found.append(
            save(named, {"format": "pt", "ss_tags": '{"a": [1, "\\u00e9\\ud83d\\ude00"]}'})
        )
    found.append(save({"é\n": torch.arange(3), "b": torch.tensor([True]), "c": torch.zeros(0, 4)}))
    for file in files:
        tensors = load_file(file)
        scalars = [key for key in tensors if not tensors[key].ndim][:2]
        chosen = [key for key in tensors if tensors[key].ndim][:5]
        found.append(
            save({key: tensors[key][:1] for key in chosen} | {k: tensors[k] for k in scalars})
        )
    return found


def split(data: bytes) -> tuple[bytes, bytes]:
    stop = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:stop], data[stop:]


def flip(rng: random.Random, data: bytes) -> bytes:
    spoilt = bytearray(data)
    most = len(data) if rng.random() < 0.3 else len(data) - len(split(data)[1])
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        spoilt[rng.randrange(most)] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([rng.randrange(len(data)), rng.randrange(17), len(data) - 1])]


def grow(rng: random.Random, data: bytes) -> bytes:
    at = rng.choice([len(data), rng.randrange(len(data))])
    return data[:at] + rng.randbytes(rng.choice([1, 4, 100])) + data[at:]


def move(rng: random.Random, data: bytes) -> bytes:
    start, at = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 40)]
    return data[:at] + piece + data[at + rng.choice([0, len(piece)]) :]


def length(rng: random.Random, data: bytes) -> bytes:
    near = struct.unpack("<Q", data[:8])[0] + rng.randrange(-3, 4)
    return struct.pack("<Q", rng.choice([near, 0, 1, rng.getrandbits(64), 10**8])) + data[8:]


def text(rng: random.Random, data: bytes) -> bytes:
    """Exchange a part of the header's JSON, without parsing it."""
    header, body = split(data)
    at = rng.randrange(len(header))
    odd = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud800", b"-", b"0", b"1e9", b"NaN"]
    odd += [b"null", b"true", b"\xff", b"\0", b" ", b"[" * 200, b"9" * 400, b'"a":1,', b"."]
    return pack(header[:at] + rng.choice(odd) + header[at + rng.randrange(3) :], body)


def meaning(rng: random.Random, data: bytes) -> bytes:
    """Exchange values of the header."""
    raw, body = split(data)
    header = json.loads(raw)
    for _ in range(rng.choice([1, 1, 2])):
        holder: Any = header
        while True:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.2:
                break
            holder = holder[key]
        change = rng.randrange(4)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder[key], int):
            holder[key] += rng.choice([-4, -1, 1, 4, 2**32, 2**63])
        elif change == 2 and isinstance(holder, dict):
            holder[rng.choice([*holder, "__metadata__", "x"])] = holder[key]
        else:
            odd = [0, 1, -1, 2**31, 2**60, 2**64, 1.0, True, None, "", "F16", "F8_E5M2", [], {}]
            holder[key] = rng.choice([*odd, [0, 2**60], [1] * 9, [[]], {"a": 1}, "x" * 2000])
        if not header:
            break
    return pack(header, body)


SPOIL: list[Callable[[random.Random, bytes], bytes]]
SPOIL = [flip, cut, grow, move, length, text, text, meaning, meaning, meaning]


def bombs() -> Iterator[bytes]:
    """Headers of as many bytes as we take, each of the kind that costs a parser most."""
    size = 31_900_000
    for unit in (
        b"[",
        b'"',
        b"\\",
        b'\\"',
        b"[],",
        b'{"":',
        b"1,",
        b'"a":"b",',
        b"\xf0\x9f\x98\x80",
    ):
        yield pack(b'{"a":[' + unit * (size // len(unit)))
    yield pack({"__metadata__": {"a": "\U0001f600" * 1_900_000}})
    yield pack(b'{"__metadata__":{"a":"' + b"\\n" * 4_000_000 + b'"}}')
    yield pack(b'{"a":{"x":"' + b"y" * size + b'","dtype":"F32","shape":[0],"data_offsets":[0,0]}}')
    yield pack({f"{k:0250d}": entry([0, 1, 1, 1, 1, 1, 1, 1], 0, 0) for k in range(90_000)})


def too_long(*_: object) -> None:
    raise AssertionError(f"took more than {SECONDS} seconds")


def mapped() -> int:
    return (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        * resource.getpagesize()
    )


def bounded() -> None:
    """From here on, so much memory more than the libraries took."""
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + MEMORY, resource.RLIM_INFINITY))


def defuse() -> Counter[str]:
    """Read the bombs; the library is not asked, as the bounds are ours."""
    counts: Counter[str] = Counter()
    for data in bombs():
        signal.alarm(SECONDS)
        bounded()
        header = attempt(lambda data=data: read_header(Memory(data)))
        counts[header.reason if isinstance(header, AdapterError) else "read"] += 1
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return counts


def fuzz(cases: int, seed: int, files: Sequence[str]) -> Counter[str]:
    """Read files that are spoilt by chance."""
    good = bases(files)
    for data in good:
        assert judge(data) == "read"
    bounded()
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    for case in range(cases):
        spoil = rng.choice(SPOIL)
        data = spoil(rng, rng.choice(good))
        signal.alarm(SECONDS)
        try:
            counts[judge(data)] += 1
        except Exception as error:
            raise AssertionError(f"case {case} by {spoil.__name__}: {data!r}") from error
    return counts


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, too_long)
    if sys.argv[1] == "bombs":
        outcomes = defuse()
    else:
        outcomes = fuzz(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    print(json.dumps(dict(outcomes.most_common())))
