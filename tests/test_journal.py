"""Journals: no half line counts, nothing that was appended is lost, one writer at a time."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_ws import journal
from lora_ws.errors import DataError

RECORDS = [{"key": "größe", "n": 1}, {"key": "日本", "n": 2.5}, {"key": "", "n": None}]
WRITER = """
import sys
from pathlib import Path
from lora_ws import journal

folder, name, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(int(sys.argv[4])):
    with journal.locked(folder / "lock"):
        journal.append(folder / "j", [{"name": name, "number": number, "much": "x" * size}])
    print(number, flush=True)
"""


def writer(folder: Path, name: str, size: int, count: int) -> subprocess.Popen[bytes]:
    """A process that appends records, and says so of each."""
    args = [sys.executable, "-c", WRITER, folder, name, str(size), str(count)]
    return subprocess.Popen(args, stdout=subprocess.PIPE)


def numbers(file: Path, name: str) -> list[int]:
    """What a writer has left."""
    return [line["number"] for line in journal.read(file) if line["name"] == name]


def test_lines_are_plain_json(tmp_path: Path) -> None:
    starts = journal.append(tmp_path / "j", RECORDS[:2])
    starts += journal.append(tmp_path / "j", RECORDS[2:])
    content = (tmp_path / "j").read_bytes()
    assert content == "".join(json.dumps(one) + "\n" for one in RECORDS).encode()
    assert [json.loads(content[at:].split(b"\n")[0]) for at in starts] == RECORDS
    assert [start for start, _ in journal.lines(tmp_path / "j")] == starts
    assert journal.read(tmp_path / "j") == RECORDS


def test_a_missing_journal_has_no_lines(tmp_path: Path) -> None:
    assert journal.read(tmp_path / "j") == []


@pytest.mark.parametrize("way", ["read", "append", "mend"])
def test_a_line_cut_anywhere_does_not_count(tmp_path: Path, way: str) -> None:
    file = tmp_path / "j"
    whole = "".join(json.dumps(one) + "\n" for one in RECORDS).encode()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        if way == "append":
            journal.append(file, [{"last": cut}])
            assert journal.read(file) == [*RECORDS[:kept], {"last": cut}]
        elif way == "mend":
            journal.mend(file)
            assert file.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
        assert journal.read(file)[:kept] == RECORDS[:kept]


@pytest.mark.parametrize("more", [-1, 0, 1, journal.BLOCK])
def test_a_half_line_of_any_length_is_cut_off(tmp_path: Path, more: int) -> None:
    file = tmp_path / "j"
    file.write_bytes(b'{"n": 1}\n' + b"x" * (journal.BLOCK + more))
    journal.append(file, [{"n": 2}])
    assert file.read_bytes() == b'{"n": 1}\n{"n": 2}\n'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b'{"n": 1}\n{"n": \n')
    with pytest.raises(DataError, match="at byte 9, got a damaged one"):
        journal.read(tmp_path / "j")


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005])
def test_a_kill_loses_nothing_that_was_appended(tmp_path: Path, delay: float) -> None:
    child = writer(tmp_path, "killed", size=1 << 22, count=1000)
    assert child.stdout
    for _ in range(3):
        told = int(child.stdout.readline())
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    told = int((child.stdout.read().split() or [told])[-1])
    child.wait()
    found = numbers(tmp_path / "j", "killed")
    assert found == list(range(len(found)))
    assert len(found) in (told + 1, told + 2), "at most one more than it could tell of"
    with journal.locked(tmp_path / "lock", busy="the killed one holds it"):
        journal.append(tmp_path / "j", [{"name": "next", "number": 0}])
    assert numbers(tmp_path / "j", "killed") == found
    assert numbers(tmp_path / "j", "next") == [0]


def test_writers_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    killed, *others = (writer(tmp_path, name, 1 << 16, 40) for name in "abc")
    assert killed.stdout
    killed.stdout.readline()
    killed.kill()
    for child in (killed, *others):
        child.communicate()
    for name in "bc":
        assert numbers(tmp_path / "j", name) == list(range(40))
    found = numbers(tmp_path / "j", "a")
    assert found == list(range(len(found)))
    assert found


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        journal.locked(lock, "held"),
        pytest.raises(DataError, match="held"),
        journal.locked(lock, "held"),
    ):
        pytest.fail("two at once")
    with journal.locked(lock, "busy", remove=True):
        assert lock.is_file()
    assert not lock.exists()
