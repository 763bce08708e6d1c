"""Adapter files in a store of S3's kind: the bytes of a file on disk, or a refusal."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from s3_server import Fault, S3Server
from safetensors.numpy import save

from lora_ws.adapters import find_adapters
from lora_ws.adapters.addressed import FsspecSource
from lora_ws.adapters.remote import HEAD_BYTES
from lora_ws.audit.output import writing
from lora_ws.errors import AdapterError, NotAvailableError

pytestmark = pytest.mark.slow
TENSORS = {f"t{k}": np.full(40_000, k, np.float32) for k in range(12)}


@pytest.fixture(autouse=True)
def _file(s3: S3Server) -> None:
    """Of 1.9 MB, in a bucket."""
    folder = s3.root / "bucket/loras"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(save(TENSORS))


ADDRESS = "s3://bucket/loras/a.safetensors"
RANGES = [(5, 9), (600_000, 600_040), (1_500_000, 1_500_008), (600_010, 600_020)]


def bytes_of(s3: S3Server) -> bytes:
    return (s3.root / "bucket/loras/a.safetensors").read_bytes()


def test_ranges_are_those_of_the_file_and_few_bytes_move(s3: S3Server) -> None:
    source, whole = FsspecSource(ADDRESS, whole_below=0), bytes_of(s3)
    assert source.read(RANGES) == [whole[start:stop] for start, stop in RANGES]
    assert source.bytes_read == HEAD_BYTES + 40 + 8
    assert source.sha256 is None
    assert sum(line.startswith("GET") for line in s3.log) == 3
    with pytest.raises(AdapterError, match="expected bytes 0 to"):
        source.read([(0, len(whole) + 1)])


def test_other_kinds_of_addresses_are_read_alike(s3: S3Server) -> None:
    path, whole = s3.root / "bucket/loras/a.safetensors", bytes_of(s3)
    web = f"{s3.url}/bucket/loras/a.safetensors?signed=1"
    for address in (web, f"file://{path}"):
        (ref,) = find_adapters(address)
        source, _ = ref.open()
        assert source.size == len(whole)
        assert source.identity, "known again"
        parts = FsspecSource(address, whole_below=0).read(RANGES)
        assert parts == [whole[start:stop] for start, stop in RANGES]
    s3.faults.append(Fault("^GET /bucket/loras/a", "no_range"))
    with pytest.raises(AdapterError, match="expected of its server"):
        FsspecSource(web, whole_below=0).read(RANGES)


def test_a_small_file_is_one_answer_and_has_a_hash(s3: S3Server) -> None:
    source, whole = FsspecSource(ADDRESS), bytes_of(s3)
    before = source.identity
    assert source.read(RANGES) == [whole[start:stop] for start, stop in RANGES]
    assert source.sha256 == hashlib.sha256(whole).hexdigest()
    assert [line.split()[0] for line in s3.log] == ["HEAD", "GET"]
    assert source.identity == before == FsspecSource(ADDRESS).identity


@pytest.mark.parametrize("action", ["drop", "busy"])
def test_passing_trouble_passes(s3: S3Server, action: str) -> None:
    s3.faults += [Fault("^GET /bucket/loras/a", action)] * 2  # type: ignore[arg-type]
    assert (
        FsspecSource(ADDRESS, whole_below=0).read([(600_000, 600_010)])[0]
        == bytes_of(s3)[600_000:600_010]
    )


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("long", "expected of its server 10 bytes, got 11"),
        ("short", "expected of its server 10 bytes, got 9"),
        ("no_range", "expected of its server 10 bytes, got 1920"),
        ("change", "expected of its server a file that stays as it is"),
    ],
)
def test_lies_are_refused(s3: S3Server, action: str, said: str) -> None:
    source = FsspecSource(ADDRESS, whole_below=0)
    s3.faults.append(Fault("^GET /bucket/loras/a", action))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=said) as caught:
        source.read([(600_000, 600_010)])
    assert caught.value.reason == "remote"


def test_what_is_not_there_or_not_ours_is_said(s3: S3Server) -> None:
    with pytest.raises(AdapterError, match="no such file") as caught:
        _ = FsspecSource("s3://bucket/loras/b.safetensors").size
    assert caught.value.reason == "missing"
    s3.faults += [Fault("^HEAD", "forbid")]
    with pytest.raises(NotAvailableError, match="cannot be read with your login"):
        _ = FsspecSource(ADDRESS).size
    assert not s3.faults, "asked once"
    with pytest.raises(AdapterError, match="expected a folder with adapters, found none"):
        find_adapters("s3://bucket/nothing")


def test_folders_are_searched_in_the_order_of_local_ones(s3: S3Server) -> None:
    local = s3.root / "bucket" / "loras"
    for name in ("b/a.safetensors", "b/c/z.bin", "c.safetensors", "b.txt"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).touch()
    found, same = find_adapters("s3://bucket/loras"), find_adapters(str(local))
    names = [ref.name.removeprefix("s3://bucket/loras/") for ref in found]
    assert names == [ref.path.relative_to(local).as_posix() for ref in same if ref.path]
    assert found.left_out == same.left_out


def test_what_is_written_to_an_address_appears_when_it_is_whole(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    target, there = "s3://bucket/out/a.json", s3.root / "bucket/out/a.json"
    with pytest.raises(KeyError):
        write(target, "half", KeyError)
    assert not there.exists()
    write(target, "whole")
    assert there.read_text("utf-8") == "whole"
    assert not list(tmp_path.glob("lora_ws-*"))
    s3.faults += [Fault("^PUT", "forbid")] * 9
    with pytest.raises(NotAvailableError, match="what was to be there is") as caught:
        write(target, "more")
    kept = Path(str(caught.value).rpartition(" is ")[2])
    assert (kept.read_text("utf-8"), there.read_text("utf-8")) == ("more", "whole")


def write(target: str, text: str, error: type[Exception] | None = None) -> None:
    with writing(target) as file:
        file.write_text(text, encoding="utf-8")
        if error:
            raise error
