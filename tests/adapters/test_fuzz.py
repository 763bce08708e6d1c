"""Whatever is done to a file, it is read as the library reads it, or refused by an AdapterError."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from factories import SHARED
from fuzz_safetensors import judge
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import pack

TESTS = Path(__file__).parents[1]
FILES = ["catundchat_bf16", "cloneofsimo_lora_disney", "catundchat_as_kohya"]
pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="memory is limited on Linux only")


def child(*arguments: object, seconds: float) -> dict[str, int]:
    """What became of the files that a bounded process made and read."""
    result = subprocess.run(
        [sys.executable, TESTS / "fuzz_safetensors.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        timeout=seconds,
        check=False,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def real_files() -> list[Path]:
    files = [SHARED / "real_adapters" / f"{name}.safetensors" for name in FILES]
    return [file for file in files if file.exists()]


def all_kinds_were_met(counts: dict[str, int]) -> bool:
    kinds = {"read", "header", "layout", "truncated", "trailing", "dtype", "unreadable"}
    return kinds <= counts.keys()


@pytest.mark.slow
def test_spoilt_files_are_read_right_or_refused():
    counts = child(1500, 0, *real_files(), seconds=120)
    assert sum(counts.values()) == 1500
    assert all_kinds_were_met(counts)


@pytest.mark.slow
def test_very_many_spoilt_files_are_read_right_or_refused():
    counts = child(40_000, 1, *real_files(), seconds=900)
    print(counts)
    assert sum(counts.values()) == 40_000
    assert all_kinds_were_met(counts)


@pytest.mark.slow
def test_headers_made_to_cost_much_are_read_or_refused_within_the_memory():
    counts = child("bombs", seconds=300)
    print(counts)
    assert {"read", "too-large", "header"} <= counts.keys()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F4", "X"]) | JSON},
    optional={"shape": st.lists(st.integers(0, 3)) | JSON, "data_offsets": st.just([0, 4]) | JSON},
)


@pytest.mark.slow
@given(
    JSON | st.dictionaries(st.text(max_size=5), FIELDS | JSON, max_size=3), st.binary(max_size=8)
)
@settings(max_examples=200, deadline=None)
def test_any_json_as_header_is_read_right_or_refused(header: object, body: bytes):
    judge(pack(json.dumps(header).encode(), body))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_right_or_refused(data: bytes):
    judge(data)
