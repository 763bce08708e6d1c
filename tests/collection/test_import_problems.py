"""Bad rows, columns and files: refused by name, or listed aside; never a silently shorter set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import (
    SMALL,
    SMALL_SIZE,
    make_table,
    set_cell,
    weights,
    write_adapter,
    write_parquet,
)

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.collection import AdapterSet, DatasetCard, import_collection, source
from lora_ws.errors import DataError

LAYOUT = Layout(tuple(LayerSpec(*layer) for layer in SMALL))
DOWN = f"unet.{SMALL[0][0]}.lora.down.weight"
UP = f"unet.{SMALL[1][0]}.lora.up.weight"
ROWS, SHARD, BAD = 30, 15, 4  # rows; rows of a shard; a bad row of the second shard


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BATCH_BYTES", 4 * 4 * SMALL_SIZE)


class Case(NamedTuple):
    spoil: Callable[[Path], None]
    reason: str
    column: str | None = None
    row: int | None = BAD
    lost: int = 1


def cell(column: str, value: Any) -> Callable[[Path], None]:
    return lambda file: pq.write_table(
        set_cell(pq.read_table(file), column, BAD, value), file, row_group_size=6
    )


def table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda file: pq.write_table(change(pq.read_table(file)), file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_text(rows: pa.Table) -> pa.Table:
    column = pa.array([[["1", "2", "3"]]] * len(rows))
    return rows.set_column(rows.column_names.index(DOWN), DOWN, column)


def with_deep_lists(rows: pa.Table) -> pa.Table:
    column = pa.array([[[[1.0, 2.0, 3.0]]]] * len(rows))
    return rows.set_column(rows.column_names.index(DOWN), DOWN, column)


NAN, INF = float("nan"), float("inf")
CASES = {
    "null matrix": Case(cell(DOWN, None), "nothing (null)", DOWN),
    "null row of a matrix": Case(cell(DOWN, [None]), "expected a 1x3 matrix", DOWN),
    "null number": Case(cell(DOWN, [[1.0, None, 3.0]]), "expected a 1x3 matrix", DOWN),
    "too short": Case(cell(DOWN, [[1.0, 2.0]]), "expected a 1x3 matrix", DOWN),
    "empty": Case(cell(DOWN, []), "got a list of 0", DOWN),
    "ragged": Case(cell(UP, [[1.0]] * 6 + [[1.0, 2.0]]), "expected a 7x1 matrix", UP),
    "rank 4 among rank 1": Case(cell(DOWN, [[1.0] * 3] * 4), "got a list of 4", DOWN),
    "transposed": Case(cell(UP, [[1.0] * 7]), "expected a 7x1 matrix", UP),
    "NaN": Case(cell(UP, [[NAN]] * 7), "NaN or infinite", UP),
    "infinity": Case(cell(DOWN, [[1.0, -INF, 1.0]]), "NaN or infinite", DOWN),
    "text": Case(table(with_text), "expected lists of numbers", DOWN, row=0, lost=SHARD),
    "too deep": Case(table(with_deep_lists), "expected lists of n", DOWN, row=0, lost=SHARD),
    "missing column": Case(
        table(lambda t: t.drop_columns([UP])), f"missing column `{UP}`", None, None, SHARD
    ),
    "extra weight column": Case(
        table(lambda t: t.append_column("unet.mid_block.x.lora.down.weight", t[DOWN])),
        "is not part of the layout",
        None,
        None,
        SHARD,
    ),
    "matrix in two spellings": Case(
        table(lambda t: t.append_column(DOWN.replace(".lora.down", ".lora_A"), t[DOWN])),
        "are the same matrix",
        None,
        None,
        SHARD,
    ),
    "truncated file": Case(cut, "not a readable parquet file", None, None),
    "no parquet at all": Case(
        lambda file: file.write_bytes(b"<html>not found</html>"), "not a readable", None, None
    ),
    "empty file": Case(lambda file: file.write_bytes(b""), "not a readable", None, None),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    values = weights(ROWS)
    write_parquet(tmp_path / "in" / "a.parquet", make_table(values[:SHARD]), 6)
    write_parquet(tmp_path / "in" / "b.parquet", make_table(values[SHARD:]), 6)
    return tmp_path / "in"


def quarantine(store: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (store / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("name", CASES)
def test_problem_is_named_and_no_store_is_left(name: str, shards: Path, tmp_path: Path):
    case = CASES[name]
    case.spoil(shards / "b.parquet")
    with pytest.raises(DataError) as error:
        import_collection(shards, tmp_path / "s", layout=LAYOUT)
    message = str(error.value)
    where = "b.parquet" + (f", row {case.row}" if case.row is not None else "")
    where += f", column `{case.column}`" if case.column else ""
    assert message.startswith(f"{where}: ")
    assert case.reason in message
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", CASES)
def test_skipped_rows_are_listed_and_all_others_stay(name: str, shards: Path, tmp_path: Path):
    case = CASES[name]
    case.spoil(shards / "b.parquet")
    zoo = import_collection(shards, tmp_path / "s", layout=LAYOUT, on_error="skip")
    listed = quarantine(tmp_path / "s")
    assert zoo.manifest["quarantined"] == len(listed)
    assert all(entry["source"] == "b.parquet" for entry in listed)
    assert (listed[0]["row"], listed[0]["column"]) == (case.row, case.column)
    assert case.reason in listed[0]["reason"]
    assert sum(entry["rows_lost"] for entry in listed) == case.lost
    values = weights(ROWS)
    if case.row == BAD:
        kept = np.delete(np.arange(ROWS), SHARD + BAD)
        assert len(zoo) + case.lost == ROWS
    else:
        kept = np.arange(SHARD)
    np.testing.assert_array_equal(zoo.weights, values[kept])
    folders = [f"folder_{k % SHARD:05d}" for k in kept]
    assert zoo.rows["folder"].to_pylist() == folders


@pytest.mark.parametrize("name", ["null matrix", "rank 4 among rank 1", "NaN"])
def test_advice_of_the_message_works(name: str, shards: Path, tmp_path: Path):
    CASES[name].spoil(shards / "b.parquet")
    with pytest.raises(DataError, match="--on-error skip"):
        import_collection(shards, tmp_path / "s")
    zoo = import_collection(shards, tmp_path / "s", on_error="skip")
    assert len(zoo) == ROWS - 1
    assert not (tmp_path / "s.partial").exists()


def test_first_row_may_be_the_bad_one(shards: Path, tmp_path: Path):
    file = shards / "a.parquet"
    pq.write_table(set_cell(pq.read_table(file), DOWN, 0, None), file)
    zoo = import_collection(shards, tmp_path / "s", on_error="skip")
    assert (zoo.layout, len(zoo)) == (LAYOUT, ROWS - 1)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_usable_row_is_said_and_leaves_nothing(on_error: Any, tmp_path: Path):
    rows = make_table(np.full((9, SMALL_SIZE), np.nan, np.float32))
    file = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"a\.parquet.*NaN or infinite"):
        import_collection(file, tmp_path / "s", on_error=on_error)
    if on_error == "skip":
        assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    pq.write_table(make_table(weights(9)), file)
    assert len(import_collection(file, tmp_path / "s", on_error=on_error)) == 9


@pytest.mark.parametrize("write", [lambda f: cut(f), lambda f: f.write_bytes(b"")])
def test_no_readable_file_is_said(write: Callable, tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", make_table(weights(3)))
    write(file)
    with pytest.raises(DataError, match=r"no usable row in 1 parquet files; first: a\.parquet"):
        import_collection(file, tmp_path / "s", on_error="skip")


def test_columns_of_another_schema_are_listed(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", pa.table({"weights": [[1.0, 2.0]]}))
    with pytest.raises(DataError, match="schema: flat_column"):
        import_collection(file, tmp_path / "s")
    card = DatasetCard(name="x", schema="flat_column")
    with pytest.raises(DataError, match=r"--layout"):
        import_collection(file, tmp_path / "s", card=card)
    card = DatasetCard(name="x", schema="flat_column", layout="tiny_sd_qv")
    with pytest.raises(DataError, match="row 0, column `weights`: expected 7072 numbers, got a li"):
        import_collection(file, tmp_path / "s", card=card)


def test_repeated_row_names_its_twin(shards: Path, tmp_path: Path):
    values = weights(ROWS)
    values[SHARD + 2] = values[1]
    pq.write_table(make_table(values[SHARD:]), shards / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:2: repeats the weights of a\.parquet:1\."):
        import_collection(shards, tmp_path / "s")
    zoo = import_collection(shards, tmp_path / "s", on_error="skip")
    assert len(zoo) == ROWS - 1
    assert quarantine(tmp_path / "s")[0]["source"] == "b.parquet:2"


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_damaged_pages_are_named_and_counted(on_error: Any, tmp_path: Path):
    values = weights(ROWS)
    rows = make_table(values)
    file = tmp_path / "a.parquet"
    pq.write_table(rows, file, row_group_size=10, compression="zstd", use_dictionary=False)
    chunk = pq.read_metadata(file).row_group(1).column(5)
    content = bytearray(file.read_bytes())
    start = chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(content)
    if on_error == "raise":
        with pytest.raises(DataError, match=r"a\.parquet: rows 10 to 13 cannot be read"):
            import_collection(file, tmp_path / "s")
        return
    zoo = import_collection(file, tmp_path / "s", on_error="skip")
    np.testing.assert_array_equal(zoo.weights, np.delete(values, slice(10, 20), axis=0))
    assert sum(entry["rows_lost"] for entry in quarantine(tmp_path / "s")) == 10


def test_metadata_that_changes_its_kind_is_refused_by_name(shards: Path, tmp_path: Path):
    rows = pq.read_table(shards / "b.parquet")
    at = rows.column_names.index("rank")
    pq.write_table(rows.set_column(at, "rank", pa.array(["one"] * SHARD)), shards / "b.parquet")
    with pytest.raises(DataError, match="rank"):
        import_collection(shards, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_bad_adapter_files_are_listed_with_their_reasons(tmp_path: Path):
    values = weights(9)
    for k, vector in enumerate(values):
        write_adapter(tmp_path / "in" / f"a{k}.safetensors", vector)
    (tmp_path / "in" / "a2.safetensors").write_bytes(b"")
    cut(tmp_path / "in" / "a5.safetensors")
    write_adapter(tmp_path / "in" / "a7.safetensors", values[7, :7], SMALL[:1])
    with pytest.raises(DataError, match=r"^a2\.safetensors: .*empty"):
        import_collection(tmp_path / "in", tmp_path / "s")
    zoo = import_collection(tmp_path / "in", tmp_path / "s", on_error="skip")
    reasons = {e["source"]: e["reason"] for e in quarantine(tmp_path / "s")}
    assert list(reasons) == ["a2.safetensors", "a5.safetensors", "a7.safetensors"]
    assert "no layer `mid_block" in reasons["a7.safetensors"]
    np.testing.assert_array_equal(zoo.weights, np.delete(values, [2, 5, 7], axis=0))


def test_no_usable_adapter_file_is_said(tmp_path: Path):
    write_adapter(tmp_path / "a.safetensors", weights(1)[0]).write_bytes(b"")
    with pytest.raises(DataError, match="none of 1 files is a readable adapter; first: "):
        import_collection(tmp_path, tmp_path / "s", on_error="skip")


def test_existing_store_is_never_overwritten(shards: Path, tmp_path: Path):
    import_collection(shards, tmp_path / "s")
    before = (tmp_path / "s" / "weights.npy").read_bytes()
    with pytest.raises(DataError, match="exists already"):
        import_collection(shards, tmp_path / "s")
    assert (tmp_path / "s" / "weights.npy").read_bytes() == before
    assert len(AdapterSet.open(tmp_path / "s")) == ROWS
