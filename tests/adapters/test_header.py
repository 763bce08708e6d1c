"""Headers of untrusted files: what is refused, why, and that the safetensors library agrees."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import SHARED, shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import entry, library, ours, pack, same_header
from safetensors import safe_open
from safetensors.numpy import save

from lora_ws.adapters.header import BITS, LIMITS, Limits, read_header, shown
from lora_ws.adapters.source import LocalSource, Source
from lora_ws.errors import REASONS, AdapterError

GOOD = save({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float16)}, {"format": "pt"})
ONE = entry([1], 0, 4)
DEEP = b"[" * 100_000
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("archive/data.pkl", b"x" * 40)


def duplicate(second: dict[str, Any]) -> bytes:
    return f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(second)}}}'.encode()


# name -> (file, reason of ours); the library refuses all of these as well.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "two bytes": (b"{}", "unreadable"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
        "lfs-pointer",
    ),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "html"),
    "web page in capitals after a blank": (b"\n <HTML lang=en></HTML>", "html"),
    "zip": (ZIP.getvalue(), "pickle"),
    "pickle": (pickle.dumps({"a": [1.0] * 30}), "pickle"),
    "JSON error message": (b'{"error": "not found"}', "unreadable"),
    "zeros": (bytes(64), "unreadable"),
    "header length zero": (pack(b"", b"0000"), "unreadable"),
    "header longer than the file": (struct.pack("<Q", 5000) + b'{"a": 1', "truncated"),
    "header longer than the format allows": (
        struct.pack("<Q", 100_000_001) + b"{}" + bytes(40),
        "too-large",
    ),
    "header of 2**64 bytes": (b"\xff" * 8 + b"{}", "too-large"),
    "header is a list": (pack([]), "header"),
    "header is no JSON": (pack(b"{'a': 1}"), "header"),
    "header with junk behind": (pack(b"{} x"), "header"),
    "header of invalid UTF-8": (pack(b'{"\xff": 1}'), "header"),
    "header with half a surrogate pair": (
        pack(b'{"\\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "header",
    ),
    "nested brackets": (pack(b'{"a": ' + DEEP), "header"),
    "nested brackets, closed": (pack(b'{"a": ' + DEEP + b"]" * 100_000 + b"}"), "header"),
    "hole": (pack({"a": ONE, "b": entry([1], 8, 12)}, bytes(12)), "layout"),
    "hole at the start": (pack({"a": entry([1], 4, 8)}, bytes(8)), "layout"),
    "overlap": (pack({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "layout"),
    "two tensors on one range": (pack({"a": ONE, "b": ONE}, bytes(4)), "layout"),
    "trailing bytes": (pack({"a": ONE}, bytes(5)), "trailing"),
    "truncated body": (pack({"a": ONE}, bytes(3)), "truncated"),
    "reversed offsets": (pack({"a": entry([1], 4, 0)}, bytes(4)), "layout"),
    "negative offset": (pack({"a": entry([1], -4, 0)}, bytes(4)), "header"),
    "minus zero": (
        pack(b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4)),
        "header",
    ),
    "three offsets": (pack({"a": ONE | {"data_offsets": [0, 4, 4]}}, bytes(4)), "header"),
    "offset beyond 64 bits": (pack({"a": entry([1], 0, 2**64)}, bytes(4)), "header"),
    "number of 5000 digits": (pack(b'{"a": ' + b"9" * 5000 + b"}"), "header"),
    "shape does not fit": (pack({"a": entry([2], 0, 4)}, bytes(4)), "layout"),
    "shape overflows": (pack({"a": entry([2**32, 2**32, 4], 0, 4)}, bytes(4)), "too-large"),
    "shape of floats": (pack({"a": entry([1.0], 0, 4)}, bytes(4)), "header"),
    "shape of booleans": (pack({"a": entry([True], 0, 4)}, bytes(4)), "header"),
    "shape of text": (pack({"a": entry(["1"], 0, 4)}, bytes(4)), "header"),
    "shape is a number": (pack({"a": ONE | {"shape": 1}}, bytes(4)), "header"),
    "half a byte": (pack({"a": entry([1], 0, 0, "F4")}), "layout"),
    "unknown dtype": (pack({"a": entry([1], 0, 4, "F31")}, bytes(4)), "dtype"),
    "dtype is a list": (pack({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), "dtype"),
    "tensor is null": (pack({"a": None}), "header"),
    "tensor without shape": (pack({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "header"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "header"),
    "metadata is a list": (pack({"__metadata__": ["a"]}), "header"),
    "metadata is text": (pack({"__metadata__": "a"}), "header"),
    "duplicate key elsewhere": (pack(duplicate(entry([1], 4, 8)), bytes(4)), "header"),
    "duplicate field": (
        pack(b'{"a": {"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "header",
    ),
    "blank that JSON has not before the metadata": (
        pack(b'\x0b{"__metadata__": {"a": "b"}, "a": ' + json.dumps(ONE).encode() + b"}", bytes(4)),
        "unreadable",
    ),
    "comma behind the metadata alone": (pack(b'{"__metadata__": {"a": "b"},}'), "header"),
    "NaN in the metadata": (pack(b'{"__metadata__": {"a": NaN}, "b": 1}'), "header"),
    "NaN in the header": (pack(b'{"a": NaN}'), "header"),
    "number out of range": (
        pack(b'{"a": {"x":1e999,"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "header",
    ),
}

FEW = Limits(tensors=3, key_length=20, metadata_bytes=30, dims=3, elements=100, total_bytes=200)
# What the format allows and we do not.
STRICTER: dict[str, tuple[bytes, str, Limits]] = {
    "duplicate identical key": (pack(duplicate(ONE), bytes(4)), "header", LIMITS),
    "a side of 2**60 without numbers": (pack({"a": entry([0, 2**60], 0, 0)}), "too-large", LIMITS),
    "40 nested brackets": (
        pack(
            b'{"a": {"x":' + b"[" * 40 + b"]" * 40 + b"," + json.dumps(ONE)[1:].encode() + b"}",
            bytes(4),
        ),
        "header",
        LIMITS,
    ),
    "tensor as a list": (pack({"a": ["F32", [1], [0, 4]]}, bytes(4)), "header", LIMITS),
    "a million empty lists": (
        pack({"a": entry([0], 0, 0) | {"x": [[]] * 1_000_000}}),
        "too-large",
        LIMITS,
    ),
    "too many tensors": (pack({f"{k}": entry([0], 0, 0) for k in range(4)}), "too-large", FEW),
    "long header": (pack(b"{}" + b" " * 100), "too-large", Limits(header_bytes=100)),
    "long key": (pack({"k" * 21: entry([0], 0, 0)}), "too-large", FEW),
    "much metadata": (pack({"__metadata__": {"a": "é" * 15}}), "too-large", FEW),
    "many dimensions": (pack({"a": entry([1] * 4, 0, 4)}, bytes(4)), "too-large", FEW),
    "many numbers": (pack({"a": entry([101], 0, 101, "U8")}, bytes(101)), "too-large", FEW),
    "many bytes": (
        pack({k: entry([25], 100 * i, 100 * i + 100) for i, k in enumerate("abc")}, bytes(300)),
        "too-large",
        FEW,
    ),
}

LEGAL: dict[str, bytes] = {
    "good": GOOD,
    "no tensors": pack({}),
    "blanks around": pack(b" \t\n" + json.dumps({"a": ONE}).encode() + b" \r\n", bytes(4)),
    "metadata behind a tensor": pack({"a": ONE, "__metadata__": {"b": "c"}}, bytes(4)),
    "blanks about the metadata": pack(
        b'\n{\t"__metadata__" :\r{ "b" : "c" } , "a": ' + json.dumps(ONE).encode() + b"}", bytes(4)
    ),
    "metadata without entries": pack({"__metadata__": {}, "a": ONE}, bytes(4)),
    "null metadata": pack({"__metadata__": None, "a": ONE}, bytes(4)),
    "extra fields": pack({"a": ONE | {"x": [1, -3, 2.5, None, {"y": "z"}]}}, bytes(4)),
    "key that is a path": pack({"../../etc/passwd": ONE}, bytes(4)),
    "key with NUL and escapes": pack({'\0\x1b[2J\\"[[[{': ONE}, bytes(4)),
    "empty key": pack({"": ONE}, bytes(4)),
    "misaligned": pack({"a": entry([1], 0, 1, "U8"), "b": entry([1], 1, 5)}, bytes(5)),
    "scalar": pack({"a": entry([], 0, 4)}, bytes(4)),
    "empty tensors in between": pack(
        {"a": entry([0], 0, 0), "b": ONE, "c": entry([3, 0], 4, 4)}, bytes(4)
    ),
    "long metadata": pack({"__metadata__": {"modelspec.thumbnail": "x" * 500_000}}),
    "quotes and brackets in metadata": pack({"__metadata__": {"a": '\\\\"' + "[" * 500}}),
    "text that ends in a backslash, brackets behind": pack(
        {"__metadata__": {"a": "x\\", "b": "[" * 50}}
    ),
    "empty tensor named after one that begins where it does": pack(
        {"b": ONE, "a": entry([0], 0, 0)}, bytes(4)
    ),
    # Its first bytes are those of a pickle.
    "header of 640 bytes": pack(b"{}" + b" " * 638),
    **{
        f"dtype {dtype}": pack({"a": entry([8], 0, bits, dtype)}, bytes(bits))
        for dtype, bits in BITS.items()
    },
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_with_its_reason_and_by_the_library(case: str, tmp_path: Path):
    data, reason = MALFORMED[case]
    with pytest.raises(AdapterError) as caught:
        ours(tmp_path, data)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert str(caught.value).startswith(f"{tmp_path / 'file.safetensors'}: ")
    assert library(data) is None


@pytest.mark.parametrize("case", STRICTER)
def test_file_above_our_limits_is_refused_though_the_library_reads_it(case: str, tmp_path: Path):
    data, reason, limits = STRICTER[case]
    with pytest.raises(AdapterError) as caught:
        ours(tmp_path, data, limits)
    assert caught.value.reason == reason
    assert library(data) is not None


@pytest.mark.parametrize("case", LEGAL)
def test_legal_file_is_read_as_the_library_reads_it(case: str, tmp_path: Path):
    header = ours(tmp_path, LEGAL[case])
    theirs = library(LEGAL[case])
    assert theirs is not None
    assert same_header(header, theirs)
    for key, (*_, data) in theirs.items():
        start, stop = header.range_of(key)
        assert LEGAL[case][start:stop] == data


def test_metadata_is_the_librarys(tmp_path: Path):
    header = ours(tmp_path, GOOD)
    with safe_open(tmp_path / "file.safetensors", framework="np") as opened:
        assert header.metadata == opened.metadata() == {"format": "pt"}
        assert list(header.tensors) == list(opened.offset_keys())


def test_metadata_that_stand_twice_are_refused_wherever(tmp_path: Path):
    tensor = json.dumps(ONE).encode()
    for second in (b'{"b": "c"}', b"{}", b"null"):
        text = b'{"__metadata__": {"b": "c"}, "a": %b, "__metadata__": %b}' % (tensor, second)
        with pytest.raises(AdapterError, match="__metadata__` twice"):
            ours(tmp_path, pack(text, bytes(4)))


def test_files_of_one_recipe_keep_their_own_metadata(tmp_path: Path):
    for name in ("one", "two"):
        head = {"__metadata__": {"name": name}, "a": ONE}
        assert ours(tmp_path, pack(head, bytes(4))).metadata == {"name": name}


def test_what_is_no_file_is_told_from_what_is_missing(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    reasons = {"absent": "missing", "nul\0": "missing", ".": "not-a-file", "pipe": "not-a-file"}
    for name, reason in reasons.items():
        with pytest.raises(AdapterError) as caught:
            read_header(LocalSource(f"{tmp_path}/{name}"))
        assert caught.value.reason == reason


def test_only_the_header_of_a_large_file_is_read(tmp_path: Path):
    file = tmp_path / "large.safetensors"
    head = pack({"a": entry([2**28], 0, 2**30), "b": entry([2**28], 2**30, 2**31)})
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(len(head) + 2**31)
    source = LocalSource(file)
    assert read_header(source).size == len(head) + 2**31
    assert source.bytes_read < 2 * len(head) + 512


def test_a_range_beyond_the_file_is_refused(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"abc")
    source = LocalSource(tmp_path / "f")
    assert source.read([(2, 3), (0, 2), (0, 3), (1, 1)]) == [b"c", b"ab", b"abc", b""]
    for wrong in [(0, 4), (-1, 2), (2, 1)]:
        with pytest.raises(AdapterError, match="file of 3 bytes"):
            source.read([wrong])


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path):
    (tmp_path / "f").write_bytes(GOOD)
    source = LocalSource(tmp_path / "f")
    assert source.size == len(GOOD)
    (tmp_path / "f").write_bytes(GOOD[:-1])
    with pytest.raises(AdapterError, match="being written"):
        source.read([(0, len(GOOD))])


def test_source_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Source()  # pyright: ignore[reportAbstractUsage]


def test_names_in_messages_cannot_move_the_cursor(tmp_path: Path):
    key = "a\x1b[2J\n\u202e" + "k" * 500
    with pytest.raises(AdapterError) as caught:
        ours(tmp_path, pack({key: entry([1], 0, 3)}, bytes(3)))
    assert str(caught.value).isprintable()
    assert len(shown(key)) < 200


def real_files() -> list[Path]:
    return sorted(SHARED.glob("real_adapters/**/*.safetensors"))


@pytest.mark.parametrize("file", real_files() or [None], ids=lambda f: f.stem if f else "none")
def test_real_file_is_read_as_the_library_reads_it(file: Path | None):
    shared_data("real_adapters")
    assert file is not None
    theirs = library(file.read_bytes())
    assert theirs
    header = read_header(LocalSource(file))
    assert same_header(header, theirs)
    with safe_open(file, framework="np") as opened:
        assert header.metadata == (opened.metadata() or {})


COUNTS = st.integers(0, 5)
SHAPES = st.lists(
    COUNTS | st.sampled_from([2**27, 2**40, 2**63, -1, 1.5, True, "1", None]), max_size=3
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Headers that are right, or wrong in a few places."""
    header: dict[str, Any] = {}
    at = 0
    for key in draw(st.lists(st.text(max_size=6), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(COUNTS, max_size=3))
        size = int(np.prod(shape, dtype=np.int64)) * BITS[dtype] // 8
        header[key] = entry(shape, at, at + size, dtype)
        at += size
    if header and draw(st.booleans()):
        broken = header[draw(st.sampled_from(sorted(header)))]
        field = draw(st.sampled_from(["shape", "data_offsets", "dtype", "extra", "gone"]))
        if field == "shape":
            broken["shape"] = draw(SHAPES)
        elif field == "gone":
            del broken[draw(st.sampled_from(sorted(broken)))]
        else:
            broken[field] = draw(
                st.lists(st.integers(-2, 2**65) | COUNTS, max_size=3)
                | st.text(max_size=3)
                | st.floats()
            )
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.none()
            | st.dictionaries(st.text(max_size=4), st.text(max_size=9) | COUNTS, max_size=3)
        )
    at = max(at + draw(st.sampled_from([0, 0, 0, 0, -1, 1])), 0)
    return pack(json.dumps(header, ensure_ascii=draw(st.booleans())).encode(), bytes(at))


@pytest.mark.slow
@given(files())
@settings(max_examples=400, deadline=None)
def test_generated_headers_are_accepted_exactly_where_the_library_accepts(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
):
    theirs = library(data)
    header, reason = None, ""
    try:
        header = ours(tmp_path_factory.getbasetemp(), data)
    except AdapterError as error:
        reason = error.reason
    if header is None:
        assert theirs is None or reason == "too-large"
    else:
        assert theirs is not None
        assert same_header(header, theirs)
