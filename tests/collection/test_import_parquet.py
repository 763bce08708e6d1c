"""Parquet files of the published schemas: every number and every label arrives as it was."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import (
    SMALL,
    SMALL_SIZE,
    list_column,
    make_table,
    matrices,
    shared_data,
    weights,
    write_parquet,
)

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.collection import AdapterSet, DatasetCard, adapters_from, import_collection, source
from lora_ws.errors import DataError

LAYOUT = Layout(tuple(LayerSpec(*layer) for layer in SMALL))
METADATA = ["folder", "category_label", "rank", "step_loss"]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> int:
    """Batches of seven rows."""
    monkeypatch.setattr(source, "BATCH_BYTES", 7 * 4 * SMALL_SIZE)
    return 7


def stored(path: Path) -> np.ndarray:
    """The weights as numpy alone reads them."""
    return np.load(path / "weights.npy")


@pytest.mark.parametrize("kind", ["nested", "large", "fixed", "fixed_flat"])
def test_numbers_are_bit_equal_in_every_kind_of_list(kind: str, tmp_path: Path):
    values = weights(11)
    values[0, :4] = [0.0, -0.0, np.finfo(np.float32).tiny, np.finfo(np.float32).max]
    file = write_parquet(tmp_path / "a.parquet", make_table(values, kind=kind))
    zoo = import_collection(file, tmp_path / "store")
    assert stored(tmp_path / "store").tobytes() == values.tobytes()
    assert zoo.layout == LAYOUT


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["lists", "fixed", "Array2D"])
def test_columns_as_datasets_writes_them(kind: str, dtype: str, tmp_path: Path):
    """In a process that has imported `datasets`, whose columns are of types of its own."""
    values = weights(4).astype(dtype)
    columns = matrices(values, SMALL)

    def feature(shape: tuple[int, ...]) -> object:
        if kind == "Array2D":
            return datasets.Array2D(shape, dtype)
        rows, width = shape if kind == "fixed" else (-1, -1)
        inner = datasets.Sequence(datasets.Value(dtype), length=width)
        return datasets.Sequence(inner, length=rows)

    features = datasets.Features({name: feature(m.shape[1:]) for name, m in columns.items()})
    made = datasets.Dataset.from_dict({k: list(m) for k, m in columns.items()}, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    import_collection(tmp_path / "a.parquet", tmp_path / "store")
    np.testing.assert_array_equal(stored(tmp_path / "store"), values.astype(np.float32))
    made.save_to_disk(tmp_path / "disk")
    with pytest.raises(DataError, match=r"load_from_disk"):
        import_collection(tmp_path / "disk", tmp_path / "refused")


def test_rank_above_one(tmp_path: Path):
    values = weights(3, 4 * SMALL_SIZE)
    columns = {k: list_column(m) for k, m in matrices(values, SMALL, rank=4).items()}
    zoo = import_collection(
        write_parquet(tmp_path / "a.parquet", pa.table(columns)), tmp_path / "s"
    )
    assert {layer.rank for layer in zoo.layout.layers} == {4}
    np.testing.assert_array_equal(stored(tmp_path / "s"), values)
    down, up = zoo.layer(SMALL[0][0])
    np.testing.assert_array_equal(down[1].ravel(), values[1, : down[1].size])
    assert (down.shape, up.shape) == ((3, 4, 3), (3, 4, 4))


def test_flat_matrices_take_their_rank_from_the_rank_column(tmp_path: Path):
    values = weights(3, 4 * SMALL_SIZE)
    columns = {k: list_column(m, "fixed_flat") for k, m in matrices(values, SMALL, rank=4).items()}
    table = pa.table({"rank": [4, 4, 4], **columns})
    zoo = import_collection(write_parquet(tmp_path / "a.parquet", table), tmp_path / "s")
    assert {layer.rank for layer in zoo.layout.layers} == {4}


@pytest.mark.parametrize("rank", ["4", 4.0])
def test_a_rank_column_holds_numbers_of_any_kind(rank: object, tmp_path: Path):
    values = weights(3, 4 * SMALL_SIZE)
    columns = {k: list_column(m, "fixed_flat") for k, m in matrices(values, SMALL, rank=4).items()}
    file = write_parquet(tmp_path / "a.parquet", pa.table({"rank": [rank] * 3, **columns}))
    zoo = import_collection(file, tmp_path / "s")
    assert {layer.rank for layer in zoo.layout.layers} == {4}


@pytest.mark.parametrize("order", [None, [1, 0]])
@pytest.mark.parametrize("number", [pa.float32(), pa.float16()])
def test_tensors_of_arrow_have_their_own_shape(
    number: pa.DataType, order: list[int] | None, tmp_path: Path
):
    """Of rank 2, with axes stored in another order than meant, and a row without a matrix."""
    values = weights(4, 2 * SMALL_SIZE)
    columns = {}
    for name, matrix in matrices(values, SMALL, rank=2).items():
        held = matrix.transpose(0, 2, 1) if order else matrix
        kind = pa.fixed_shape_tensor(number, held.shape[1:], permutation=order)
        narrow = held.reshape(4, -1).astype(number.to_pandas_dtype())
        rows = [None if k == 2 else list(row) for k, row in enumerate(narrow)]
        storage = pa.array(rows, pa.list_(number, narrow.shape[1]))
        columns[name] = pa.ExtensionArray.from_storage(kind, storage)
    file = write_parquet(tmp_path / "a.parquet", pa.table(columns))
    zoo = import_collection(file, tmp_path / "s", on_error="skip")
    assert {layer.rank for layer in zoo.layout.layers} == {2}
    expected = np.delete(values, 2, axis=0).astype(number.to_pandas_dtype()).astype(np.float32)
    np.testing.assert_array_equal(zoo.weights, expected)


def test_views_of_lists_are_lists(tmp_path: Path):
    values = weights(3)
    view = pa.list_view(pa.list_view(pa.float32()))
    columns = {name: pa.array(m.tolist(), view) for name, m in matrices(values, SMALL).items()}
    import_collection(write_parquet(tmp_path / "a.parquet", pa.table(columns)), tmp_path / "s")
    np.testing.assert_array_equal(stored(tmp_path / "s"), values)


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_columns_of_no_lists_are_named_with_what_they_hold(kind: str, tmp_path: Path):
    columns = {
        name: pa.array([m.tobytes() if kind == "binary" else str(m.tolist()) for m in matrix])
        for name, matrix in matrices(weights(2), SMALL).items()
    }
    file = write_parquet(tmp_path / "a.parquet", pa.table(columns))
    with pytest.raises(DataError, match=rf"column `unet\.\S+` holds {kind}, expected lists"):
        import_collection(file, tmp_path / "s")


@pytest.mark.parametrize("rows_a_group", [1, 3, 7, 20, 100])
def test_shards_and_row_groups_keep_their_order(
    rows_a_group: int, small_batches: int, tmp_path: Path
):
    values = weights(53)
    for name, part in [("s-2", slice(0, 20)), ("s-10", slice(20, 21)), ("s-11", slice(21, 53))]:
        write_parquet(tmp_path / "in" / f"{name}.parquet", make_table(values[part]), rows_a_group)
    zoo = import_collection(tmp_path / "in", tmp_path / "store")
    np.testing.assert_array_equal(stored(tmp_path / "store"), values)
    assert zoo.rows["source"].to_pylist()[19:22] == [
        "s-2.parquet:19",
        "s-10.parquet:0",
        "s-11.parquet:0",
    ]


def test_all_metadata_is_kept(small_batches: int, tmp_path: Path):
    table = make_table(weights(20))
    file = write_parquet(tmp_path / "a.parquet", table, 6)
    import_collection(file, tmp_path / "store")
    rows = pq.read_table(tmp_path / "store" / "rows.parquet")
    assert rows.select(METADATA).to_pylist() == table.select(METADATA).to_pylist()
    assert len(set(rows["sha256"].to_pylist())) == 20


def test_columns_that_only_some_shards_have_are_kept(tmp_path: Path):
    table = make_table(weights(6))
    extra = table.slice(3).append_column("leaf_id", pa.array([7, 8, 9]))
    write_parquet(tmp_path / "in" / "a.parquet", table.slice(0, 3))
    write_parquet(tmp_path / "in" / "b.parquet", extra)
    zoo = import_collection(tmp_path / "in", tmp_path / "store")
    assert zoo.rows["leaf_id"].to_pylist() == [None, None, None, 7, 8, 9]


def test_columns_named_as_ours_keep_their_values(tmp_path: Path):
    table = make_table(weights(2)).append_column("source", pa.array(["x", "y"]))
    table = table.append_column("sha256", pa.array(["1", "2"]))
    zoo = import_collection(write_parquet(tmp_path / "a.parquet", table), tmp_path / "s")
    assert zoo.rows["original_source"].to_pylist() == ["x", "y"]
    assert zoo.rows["original_sha256"].to_pylist() == ["1", "2"]
    assert zoo.rows["source"].to_pylist() == ["a.parquet:0", "a.parquet:1"]


def test_shards_of_one_name_in_two_folders_stay_apart(tmp_path: Path):
    values = weights(4)
    write_parquet(tmp_path / "in" / "x" / "0.parquet", make_table(values[:2]))
    write_parquet(tmp_path / "in" / "y" / "0.parquet", make_table(values[2:]))
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.rows["source"].to_pylist() == [f"{f}/0.parquet:{k}" for f in "xy" for k in (0, 1)]


@pytest.mark.parametrize("number", [pa.float64(), pa.float16(), pa.int32()])
def test_other_number_types_become_float32(number: pa.DataType, tmp_path: Path):
    values = np.round(weights(5) * 100).astype(number.to_pandas_dtype())
    columns = {k: list_column(m) for k, m in matrices(values, SMALL).items()}
    file = write_parquet(tmp_path / "a.parquet", pa.table(columns))
    import_collection(file, tmp_path / "s")
    assert stored(tmp_path / "s").dtype == np.float32
    np.testing.assert_array_equal(stored(tmp_path / "s"), values.astype(np.float32))


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
def test_flat_schema_reads_one_vector_column(kind: str, small_batches: int, tmp_path: Path):
    values = weights(17, Layout.known("tiny_sd_qv").size)
    size = values.shape[1]
    kinds = {
        "list": pa.list_(pa.float32()),
        "large_list": pa.large_list(pa.float32()),
        "fixed": pa.list_(pa.float32(), size),
    }
    column = pa.array(list(values), kinds[kind])
    table = pa.table({"label": ["neutral"] * 17, "vector": column})
    file = write_parquet(tmp_path / "a.parquet", table, 5)
    card = DatasetCard(
        name="flat", schema="flat_column", weights_column="vector", layout="tiny_sd_qv"
    )
    zoo = import_collection(file, tmp_path / "s", card=card)
    np.testing.assert_array_equal(stored(tmp_path / "s"), values)
    assert zoo.rows.column_names == ["label", "source", "sha256"]


def test_files_written_by_datasets(tmp_path: Path):
    table = make_table(weights(9))
    labels = datasets.ClassLabel(names=["cat", "dog"])
    made = datasets.Dataset.from_dict(table.to_pydict()).cast_column("category_label", labels)
    made.to_parquet(tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("category_label").type == pa.int64()
    zoo = import_collection(tmp_path / "a.parquet", tmp_path / "s")
    assert zoo.rows["category_label"].to_pylist() == table["category_label"].to_pylist()
    np.testing.assert_array_equal(stored(tmp_path / "s"), weights(9))


def test_class_numbers_are_spelt_out_and_minus_one_is_no_label(tmp_path: Path):
    table = make_table(weights(4))
    at = table.column_names.index("category_label")
    table = table.set_column(at, "category_label", pa.array([1, 0, -1, None], pa.int64()))
    features = {
        "category_label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        "step_loss": [{"dtype": "float64", "_type": "Value"}],
    }
    info = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": info})
    zoo = import_collection(write_parquet(tmp_path / "a.parquet", table), tmp_path / "s")
    assert zoo.rows["category_label"].to_pylist() == ["dog", "cat", None, None]


def test_store_says_where_it_comes_from(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", make_table(weights(4)))
    import_collection(file, tmp_path / "s", origin={"hub_id": "o/n", "commit": "c0ffee"})
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["rows"], manifest["quarantined"]) == (4, 0)
    assert (manifest["hub_id"], manifest["commit"]) == ("o/n", "c0ffee")
    assert manifest["fingerprint"] == LAYOUT.fingerprint
    assert manifest["source"]["files"] == [["a.parquet", file.stat().st_size]]


def test_version_follows_the_content(tmp_path: Path):
    versions = []
    for k, seed in enumerate([0, 0, 1]):
        file = write_parquet(tmp_path / f"{k}.parquet", make_table(weights(4, seed=seed)))
        versions.append(import_collection(file, tmp_path / f"s{k}").version)
    assert versions[0] == versions[1] != versions[2]


# Real data


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> AdapterSet:
    file = shared_data("lora-ws-tiny") / "shared-init.parquet"
    return import_collection(file, tmp_path_factory.mktemp("real") / "s")


def test_real_nested_parquet_is_bit_equal(real: AdapterSet):
    assert real.layout == Layout.known("tiny_sd_qv")
    source = pq.ParquetFile(shared_data("lora-ws-tiny") / "shared-init.parquet")
    names = [n for n in source.schema_arrow.names if n.startswith("unet.")]
    for group, start in [(0, 0), (3, 750)]:
        read = source.read_row_group(group, columns=names).slice(0, 20)
        expected = [np.array(read[n].to_pylist(), np.float32).reshape(20, -1) for n in names]
        np.testing.assert_array_equal(real.weights[start : start + 20], np.hstack(expected))


def test_real_folders_equal_the_first_rows_of_the_parquet(real: AdapterSet, tmp_path: Path):
    files = import_collection(shared_data("lora-ws-tiny") / "folders", tmp_path / "files")
    order = np.argsort([name[-len("00000") :] for name in files.column("folder")])
    assert len(files) == 20
    np.testing.assert_array_equal(files.weights[order], real.weights[:20])
    for name in ("category_label", "category_name", "leaf_id", "step_loss"):
        values = files.rows[name].to_pylist()
        assert [values[k] for k in order] == real.rows[name].to_pylist()[:20]


def test_opening_does_not_read_the_weights(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", make_table(weights(4)))
    import_collection(file, tmp_path / "s")
    assert isinstance(AdapterSet.open(tmp_path / "s").weights, np.memmap)


def flat_parquet(folder: Path, values: np.ndarray, layers: list, rank: int) -> Path:
    columns = matrices(values, layers, rank=rank)
    table = {name: list_column(m, "fixed_flat") for name, m in columns.items()}
    return write_parquet(folder / f"{rank}.parquet", pa.table(table))


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("widths", "context"), [((320, 640, 1280), 768), ((32, 64, 64), 64)], ids=["SD1.5", "tiny-sd"]
)
def test_flat_matrices_without_a_rank_have_that_of_their_lengths(
    rank: int, widths: tuple[int, ...], context: int, tmp_path: Path
):
    blocks = zip(("down_blocks.0", "down_blocks.1", "mid_block"), widths, strict=True)
    layers = [
        (f"{block}.attentions.0.transformer_blocks.0.{name}", inputs or width, width)
        for block, width in blocks
        for name, inputs in (("attn1.to_q", 0), ("attn2.to_v", context))
    ]
    values = weights(2, sum(rank * (i + o) for _, i, o in layers))
    file = flat_parquet(tmp_path, values, layers, rank)
    zoo = import_collection(file, tmp_path / "s")
    assert {layer.rank for layer in zoo.layout.layers} == {rank}
    np.testing.assert_array_equal(stored(tmp_path / "s"), values)
    assert adapters_from(pq.read_table(file)).layout == zoo.layout


def test_flat_matrices_of_an_unknown_model_need_a_rank(tmp_path: Path):
    table = make_table(weights(2), kind="fixed_flat").drop("rank")
    # Lengths without a common divisor leave rank 1.
    file = write_parquet(tmp_path / "a.parquet", table)
    assert import_collection(file, tmp_path / "s").layout == LAYOUT
    file = flat_parquet(tmp_path, weights(2, 4 * SMALL_SIZE), list(SMALL), 4)
    with pytest.raises(DataError, match="without a rank: their lengths fit 1, 2, 4; add"):
        import_collection(file, tmp_path / "t")


@pytest.mark.parametrize("matrix", ["down", "up"])
def test_flat_matrices_of_several_ranks_are_refused(matrix: str, tmp_path: Path):
    layers = [
        (f"{block}.attentions.0.transformer_blocks.0.attn2.to_v", 768, width)
        for block, width in (("down_blocks.0", 320), ("down_blocks.1", 640), ("mid_block", 1280))
    ]
    columns = matrices(weights(2, sum(2 * (i + o) for _, i, o in layers)), layers, rank=2)
    name = next(n for n in columns if "mid_block" in n and matrix in n)
    columns[name] = np.tile(columns[name], (1, 2, 1))
    table = pa.table({n: list_column(m, "fixed_flat") for n, m in columns.items()})
    file = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(DataError, match=r"mid_block.*of rank 2, as those of 2 of 3 modules.*got"):
        import_collection(file, tmp_path / "s")
    said = table.append_column("rank", pa.array([3, 3]))
    with pytest.raises(DataError, match="expected a multiple of 3 numbers, as of rank 3, got 640"):
        adapters_from(said)
