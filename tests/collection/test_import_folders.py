"""Folders of adapter files: the tree that the published pipeline writes, and plain folders."""

import hashlib
import importlib
from pathlib import Path

import numpy as np
import pytest
from factories import SMALL_SIZE, make_table, weights, write_adapter, write_parquet

from lora_ws.collection import import_collection, load, source
from lora_ws.collection.store import MANIFEST
from lora_ws.errors import DataError

NAME = "pytorch_lora_weights.safetensors"


def write_tree(root: Path, values: np.ndarray) -> None:
    """<category>/folder_00000/…, categories in turn."""
    for k, vector in enumerate(values):
        category = ("cat", "dog")[k % 2]
        metadata = {"category_label": category, "leaf_id": k, "step_loss": [0.5, k / 8]}
        write_adapter(root / category / f"folder_{k:05d}" / NAME, vector, metadata=metadata)


def test_tree_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "BATCH_BYTES", 3 * 4 * SMALL_SIZE)
    values = weights(10)
    write_tree(tmp_path / "in", values)
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    np.testing.assert_array_equal(np.load(tmp_path / "s" / "weights.npy"), values[order])
    assert zoo.rows["leaf_id"].to_pylist() == order
    assert zoo.rows["step_loss"].to_pylist() == [[0.5, k / 8] for k in order]
    assert zoo.rows["folder"].to_pylist()[5] == "dog/folder_00001"
    assert zoo.rows["source"].to_pylist()[0] == f"cat/folder_00000/{NAME}"
    content = (tmp_path / "in" / "cat" / "folder_00000" / NAME).read_bytes()
    assert zoo.rows["file_sha256"].to_pylist()[0] == hashlib.sha256(content).hexdigest()


def test_plain_folder_in_natural_order(tmp_path: Path):
    values = weights(12)
    for k, vector in enumerate(values):
        write_adapter(tmp_path / "in" / f"a{k}.safetensors", vector)
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    np.testing.assert_array_equal(zoo.weights, values)
    assert "category_label" not in zoo.rows.column_names


def test_without_metadata_the_top_folder_is_the_category(tmp_path: Path):
    for category, vector in zip(["cat", "dog"], weights(2), strict=True):
        write_adapter(tmp_path / "in" / category / "x.safetensors", vector)
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.column("category_label").tolist() == ["cat", "dog"]


def test_metadata_of_later_files_is_kept(tmp_path: Path):
    first, second, third = weights(3)
    write_adapter(tmp_path / "in" / "a" / NAME, first)
    write_adapter(tmp_path / "in" / "b" / NAME, second, metadata={"leaf_id": 5})
    write_adapter(tmp_path / "in" / "c" / NAME, third, metadata={"leaf_id": 5.5, "source": "me"})
    zoo = import_collection(tmp_path / "in", tmp_path / "s")
    assert zoo.rows["leaf_id"].to_pylist() == [None, 5, 5.5]
    assert zoo.rows["original_source"].to_pylist() == [None, None, "me"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "metadata.json is not readable"),
        ("[1, 2]", "metadata.json holds list"),
        ('{"leaf_id": "seven"}', "of another kind"),
    ],
)
def test_unusable_metadata_is_a_problem_of_its_file(text: str, message: str, tmp_path: Path):
    for name, vector in zip("abc", weights(3), strict=True):
        write_adapter(tmp_path / "in" / name / NAME, vector, metadata={"leaf_id": 1})
    (tmp_path / "in" / "b" / "metadata.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        import_collection(tmp_path / "in", tmp_path / "s")
    assert str(error.value).startswith(f"b/{NAME}: ")
    zoo = import_collection(tmp_path / "in", tmp_path / "s", on_error="skip")
    assert zoo.rows["category_label"].to_pylist() == ["a", "c"]
    np.testing.assert_array_equal(zoo.weights, weights(3)[[0, 2]])


def test_several_places_at_once(tmp_path: Path):
    values = weights(2)
    one = write_adapter(tmp_path / "x" / "one.safetensors", values[0])
    write_adapter(tmp_path / "y" / "two.safetensors", values[1])
    zoo = import_collection([one, tmp_path / "y"], tmp_path / "s")
    np.testing.assert_array_equal(zoo.weights, values)
    assert zoo.rows["source"].to_pylist() == ["x/one.safetensors", "y/two.safetensors"]


def test_nothing_named_is_left_out_in_silence(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", make_table(weights(2)))
    (tmp_path / "b.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for other in ("b.bin", "empty", "absent"):
        with pytest.raises(DataError, match=other):
            import_collection([file, tmp_path / other], tmp_path / "s")
    write_adapter(tmp_path / "c.safetensors", weights(1)[0])
    with pytest.raises(DataError, match="of one kind"):
        import_collection([file, tmp_path / "c.safetensors"], tmp_path / "s")


def test_another_version_reads_a_folder_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_WS_CACHE", str(tmp_path / "cache"))
    for category, vector in zip(["cat", "dog"], weights(2), strict=True):
        write_adapter(tmp_path / "in" / category / "x.safetensors", vector)
    load(tmp_path / "in")
    load(tmp_path / "in")
    stores = [file.parent for file in (tmp_path / "cache").rglob(MANIFEST)]
    assert len(stores) == 1
    monkeypatch.setattr(importlib.import_module("lora_ws.collection.load"), "version", str.upper)
    np.testing.assert_array_equal(load(tmp_path / "in").weights, weights(2))
    assert len(list((tmp_path / "cache").rglob(MANIFEST))) == 2
