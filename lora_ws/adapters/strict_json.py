"""JSON of an untrusted header: as strict as the safetensors library, and bounded beforehand."""

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

from lora_ws.errors import AdapterError, shown

# A header is three levels deep; the parser must not recurse as deep as a file likes.
DEPTH = 32
_SURROGATE = re.compile(r"\\u[dD]")
# Bytes that say nothing of how deep a text is, or of how many values.
NO_MARKS = bytes(set(range(256)) - set(b'"[]{},'))


def check_structure(raw: bytes, most: int) -> None:
    """Bound depth and number of values before a parser makes objects of them.

    Args:
        raw: JSON.
        most: brackets and commas.

    Raises:
        AdapterError: there are more (``too-large``), or it is too deep (``header``).
    """
    # An escaped quote does not end its string. Pairs of backslashes go first.
    text = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    marks = np.frombuffer(text.translate(None, NO_MARKS), np.uint8)
    # Parity survives that the count wraps around.
    outside = np.cumsum(marks == ord('"'), dtype=np.uint8) % 2 == 0
    opening = ((marks == ord("[")) | (marks == ord("{"))) & outside
    closing = ((marks == ord("]")) | (marks == ord("}"))) & outside
    tokens = np.count_nonzero(opening) + np.count_nonzero((marks == ord(",")) & outside)
    if tokens > most:
        raise AdapterError(f"expected a header of at most {most} parts, got {tokens}", "too-large")
    steps = opening.view(np.int8) - closing.view(np.int8)
    depth = np.cumsum(steps, dtype=np.int32).max(initial=0)
    if depth > DEPTH:
        raise AdapterError(
            f"expected a header of three levels, got {depth} nested brackets", "header"
        )


def parse_value(text: str, at: int = 0) -> tuple[Any, int]:
    """Parse a value of a text whose structure has been checked.

    Args:
        text: JSON.
        at: where the value begins.

    Returns:
        It, and where it ends. Numbers that are no size, negative ones too, are NaN.

    Raises:
        AdapterError: a name comes twice, or a number is none.
        ValueError: it is no JSON, or no text.
    """
    decoder = json.JSONDecoder(
        object_pairs_hook=_unique,
        parse_int=_natural,
        parse_float=_finite,
        parse_constant=_no_number,
    )
    value, end = decoder.raw_decode(text, at)
    if _SURROGATE.search(text, at, end):
        # Python takes half a surrogate pair, which is no text, for a character.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise AdapterError(f"expected each name once, got {shown(twice)} twice", "header")
    return found


def _natural(text: str) -> int | float:
    # As in the format's own reader, what no unsigned 64 bits hold, minus zero too, is no size.
    if len(text) <= 20 and text.isdecimal() and (number := int(text)) < 2**64:
        return number
    return math.nan


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise AdapterError(f"expected numbers in range, got {shown(text)}", "header")
    return value


def _no_number(text: str) -> NoReturn:
    raise AdapterError(f"expected a header of valid JSON, got {text}", "header")
