"""Imports that are killed, resumed, spoilt or run twice at once: nothing lost, nothing doubled."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from factories import SMALL_SIZE, make_table, set_cell, weights, write_adapter, write_parquet
from warm import Warm

from lora_ws.adapters import Layout
from lora_ws.collection import AdapterSet, DatasetCard, files_source, import_collection
from lora_ws.collection import source as importer
from lora_ws.errors import DataError

ROWS = 200


CHILD = """
import sys
from lora_ws.collection import import_collection, files_source, source
# One row per batch, so that there are many moments to be killed at.
source.BATCH_BYTES = 1
import_collection(sys.argv[1], sys.argv[2], on_error="skip")
"""


def committed(store: Path) -> int:
    journal = store.with_name(store.name + ".partial") / "journal.jsonl"
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def wait_for(store: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while committed(store) < lines and not store.exists():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def content(store: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards; two rows are bad."""
    table = make_table(weights(ROWS))
    down = next(name for name in table.column_names if name.endswith("down.weight"))
    half = ROWS // 2
    first = set_cell(table.slice(0, half), down, 17, None)
    write_parquet(tmp_path / "in" / "a.parquet", first, 50)
    second = set_cell(table.slice(half), down, 60, [[1.0]])
    write_parquet(tmp_path / "in" / "b.parquet", second, 50)
    return tmp_path / "in"


@pytest.mark.slow
def test_killed_imports_end_as_if_nothing_had_happened(source: Path, tmp_path: Path, warm: Warm):
    store = tmp_path / "s"
    random = np.random.default_rng()
    reached = [0]
    for _ in range(6):
        job = warm.start(CHILD, source, store)
        wait_for(store, reached[-1] + int(random.integers(1, 28)))
        time.sleep(random.uniform(0, 0.004))
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait()[0] == -signal.SIGKILL
        assert not store.exists()
        reached.append(committed(store))
    assert reached == sorted(set(reached)), "some work was lost"
    warm.run(CHILD, source, store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importer, "BATCH_BYTES", 1)
        import_collection(source, tmp_path / "whole", on_error="skip", card=DatasetCard(name="s"))
    assert content(tmp_path / "s") == content(tmp_path / "whole")
    zoo = AdapterSet.open(tmp_path / "s")
    expected = np.delete(weights(ROWS), [17, ROWS // 2 + 60], axis=0)
    np.testing.assert_array_equal(zoo.weights, expected)
    assert len(set(zoo.column("sha256").tolist())) == len(zoo) == ROWS - 2
    assert not list(tmp_path.glob("s.*"))


@pytest.mark.slow
def test_second_import_into_one_place_is_refused(source: Path, tmp_path: Path, warm: Warm):
    job = warm.start(CHILD, source, tmp_path / "s")
    wait_for(tmp_path / "s", 3)
    os.kill(job.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="is being written by another process"):
        import_collection(source, tmp_path / "s", on_error="skip")
    os.kill(job.pid, signal.SIGCONT)
    assert job.wait()[0] == 0
    assert len(AdapterSet.open(tmp_path / "s")) == ROWS - 2


# In one process: an import that stops at a given row, as a kill would stop it


def stop_at(row: int, patch: pytest.MonkeyPatch) -> None:
    from lora_ws.collection.store import StoreWriter

    append = StoreWriter.append

    def stopping(self: StoreWriter, *args: object, **kwargs: object) -> None:
        if self.rows >= row:
            raise KeyboardInterrupt
        append(self, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(StoreWriter, "append", stopping)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder of 20 clean rows whose import stopped after 8; returns the source."""
    file = write_parquet(tmp_path / "in" / "a.parquet", make_table(weights(20)), 6)
    interrupt(file, tmp_path / "s")
    assert committed(tmp_path / "s") == 4
    return file


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "BATCH_BYTES", 2 * 4 * SMALL_SIZE)


def interrupt(source: Path, store: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(8, patch)
        with pytest.raises(KeyboardInterrupt):
            import_collection(source, store)


def partial(tmp_path: Path, name: str) -> Path:
    return tmp_path / "s.partial" / name


def test_half_written_journal_line_does_not_count(begun: Path, tmp_path: Path):
    with partial(tmp_path, "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write('{"rows": 2, "quar')
    import_collection(begun, tmp_path / "s")
    np.testing.assert_array_equal(AdapterSet.open(tmp_path / "s").weights, weights(20))


def test_numbers_behind_the_last_line_are_cut_off(begun: Path, tmp_path: Path):
    with partial(tmp_path, "weights.npy").open("ab") as file:
        file.write(b"\xff" * 333)
    partial(tmp_path, "rows/000004.parquet").write_bytes(b"half a file")
    import_collection(begun, tmp_path / "s")
    np.testing.assert_array_equal(AdapterSet.open(tmp_path / "s").weights, weights(20))
    assert (tmp_path / "s" / "weights.npy").stat().st_size == 128 + 20 * SMALL_SIZE * 4


def test_numbers_that_went_missing_are_noticed(begun: Path, tmp_path: Path):
    file = partial(tmp_path, "weights.npy")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match="shorter than its journal says"):
        import_collection(begun, tmp_path / "s")


def test_row_repeated_across_the_interruption_is_found(tmp_path: Path):
    values = weights(20)
    values[15] = values[3]
    file = write_parquet(tmp_path / "a.parquet", make_table(values))
    interrupt(file, tmp_path / "s")
    with pytest.raises(DataError, match=r"a\.parquet:15: repeats the weights of a\.parquet:3"):
        import_collection(file, tmp_path / "s")


def test_folders_are_resumed_too(tmp_path: Path):
    for k, vector in enumerate(weights(20)):
        write_adapter(tmp_path / "in" / f"{k}.safetensors", vector)
    interrupt(tmp_path / "in", tmp_path / "s")
    read = []
    with pytest.MonkeyPatch.context() as patch:
        original = files_source.read_adapter
        patch.setattr(files_source, "read_adapter", lambda f: read.append(f.name) or original(f))
        zoo = import_collection(tmp_path / "in", tmp_path / "s")
    np.testing.assert_array_equal(zoo.weights, weights(20))
    assert "8.safetensors" in read
    assert "7.safetensors" not in read


def test_another_source_is_not_mixed_in(begun: Path, tmp_path: Path):
    other = write_parquet(tmp_path / "b.parquet", make_table(weights(20, seed=1)))
    with pytest.raises(DataError, match=r"s\.partial holds an unfinished import of something else"):
        import_collection(other, tmp_path / "s")
    np.testing.assert_array_equal(import_collection(begun, tmp_path / "s").weights, weights(20))


def test_other_options_are_not_mixed_in(begun: Path, tmp_path: Path):
    with pytest.raises(DataError, match="unfinished import of something else"):
        import_collection(begun, tmp_path / "s", layout=Layout.known("tiny_sd_qv"))
    with pytest.raises(DataError, match="unfinished import of something else"):
        import_collection(begun, tmp_path / "s", origin={"commit": "another"})


def test_strict_import_goes_on_with_skipping(begun: Path, tmp_path: Path):
    zoo = import_collection(begun, tmp_path / "s", on_error="skip")
    np.testing.assert_array_equal(zoo.weights, weights(20))


def test_skipping_import_does_not_go_on_strictly(tmp_path: Path):
    table = make_table(weights(20))
    down = next(name for name in table.column_names if name.endswith("down.weight"))
    file = write_parquet(tmp_path / "a.parquet", set_cell(table, down, 3, None))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            import_collection(file, tmp_path / "s", on_error="skip")
    with pytest.raises(DataError, match=r"has listed 1 entries aside"):
        import_collection(file, tmp_path / "s")
    assert len(import_collection(file, tmp_path / "s", on_error="skip")) == 19
    listed = (tmp_path / "s" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in listed] == [3]


def test_mended_source_can_be_imported_where_nothing_was_committed(tmp_path: Path):
    table = make_table(weights(20))
    down = next(name for name in table.column_names if name.endswith("down.weight"))
    file = write_parquet(tmp_path / "a.parquet", set_cell(table, down, 1, None))
    with pytest.raises(DataError, match="row 1"):
        import_collection(file, tmp_path / "s")
    pq.write_table(table.append_column("more", table["rank"]), file)
    assert len(import_collection(file, tmp_path / "s")) == 20
