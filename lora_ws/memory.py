"""The one bound on memory: what is held as a whole is a share of it, the rest is read in blocks.

It holds for what commands make of data: rows, features, kernels, bases of principal components.
Libraries (about half a GB) and networks in training come on top.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lora_ws.errors import ConfigError
from lora_ws.system import memory_of_machine

# Worker processes and ranks inherit it.
LIMIT = "LORA_WS_MEMORY_LIMIT"
# Of rows that are read at once. It fits every limit, and does not follow it, because results hang
# on it in their last bits; larger blocks are no faster.
BLOCK_BYTES = 64 << 20
LEAST = 4 * BLOCK_BYTES
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def memory_limit() -> int:
    """Bytes that data may take: what ``--memory_limit`` says, else a quarter of the machine.

    Example:
        >>> with bounded("4GiB"):
        ...     memory_limit()
        4294967296
    """
    given = os.environ.get(LIMIT)
    return int(given) if given else memory_of_machine() // 4


@contextmanager
def bounded(memory_limit: str | None = None) -> Iterator[None]:
    """Bound what data take, in this process and those it starts.

    Args:
        memory_limit: memory for data, such as 4GiB: rows, features, kernels; null takes a quarter
            of the machine. Networks in training come on top.

    Raises:
        ConfigError: that is no size, or less than any command can work with.

    Example:
        >>> with bounded("1GiB"):
        ...     held_bytes() >> 20
        256
    """
    before = os.environ.get(LIMIT)
    if memory_limit is not None:
        os.environ[LIMIT] = str(_size(memory_limit))
    try:
        yield
    finally:
        os.environ.pop(LIMIT, None) if before is None else os.environ.update({LIMIT: before})


def held_bytes() -> int:
    """What may be held as a whole, such as the features of all rows: a quarter of the limit."""
    return memory_limit() // 4


def check_room(what: str, size: int, share: int = 4, advice: str = "") -> None:
    """Refuse what has to be held as a whole, before work, where the limit has no room for it.

    Args:
        what: as the user calls it.
        size: bytes that it takes.
        share: it may take one part in so many of the limit.
        advice: what else would do.

    Raises:
        ConfigError: it takes more; the message says which limit would do.

    Example:
        >>> with bounded("1GiB"):
        ...     check_room("rows", 1 << 28)
    """
    most = memory_limit() // share
    if size > most:
        part = "" if share == 1 else f", one {share}th of --memory_limit"
        raise ConfigError(
            f"{what}: expected at most {most >> 20} MiB to hold{part}, got {_mebibytes(size)} MiB; "
            f"use --memory_limit {_mebibytes(share * size)}MiB{advice and f', or {advice}'}"
        )


def _mebibytes(size: int) -> int:
    return -(-size >> 20)


def blocks(rows: int, row_bytes: int, most: int = BLOCK_BYTES) -> Iterator[slice]:
    """Consecutive rows that take so many bytes together, at least one.

    Args:
        rows: how many there are.
        row_bytes: what each takes.
        most: bytes of a block.

    Example:
        >>> list(blocks(5, 4, most=8))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, most // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    unit = ({**UNITS, **BINARY}).get(found[2]) if found else None
    if found is None or unit is None:
        raise ConfigError(f"memory_limit: expected a size such as 4GiB or 500MB, got `{text}`")
    size = int(float(found[1]) * unit)
    if size < LEAST:
        raise ConfigError(f"memory_limit: expected at least {LEAST >> 20}MiB, got `{text}`")
    return size
