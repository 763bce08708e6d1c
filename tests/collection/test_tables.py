"""Collections as tables of arrow, pandas and datasets, and back: nothing is lost or rounded."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel

from lora_ws import AdapterSet, DatasetCard, LayerSpec, Layout, adapters_from
from lora_ws.errors import DataError
from lora_ws.learn.tasks import Classification, MultiLabel

PATH = "mid_block.attentions.{}.transformer_blocks.0.attn1.to_q"
DOWN, UP = (f"unet.{PATH.format(0)}.lora.{role}.weight" for role in ("down", "up"))


def adapters(ranks: tuple[int, ...], rows: int = 5) -> AdapterSet:
    layers = [LayerSpec(PATH.format(k), 3 + k, 2, r) for k, r in enumerate(ranks)]
    layout = Layout.from_layers(layers)
    weights = np.random.default_rng(0).standard_normal((rows, layout.size), np.float32)
    weights[0, 0] = np.nextafter(np.float32(1), np.float32(2))
    columns = {
        "category_label": ["cat", "dog", None, "cat", "dog"],
        "labels": [["a"], [], ["a", "b"], ["b"], []],
        "count": list(range(rows)),
        "score": [0.1, 0.2, 0.3, 0.4, 0.5],
        "flagged": [True, False, True, True, False],
        "sha256": [f"hash {k}" for k in range(rows)],
        "source": [f"file {k}" for k in range(rows)],
    }
    return AdapterSet(weights, layout, pa.table(columns), DatasetCard("mine"))


WAYS: dict[str, Callable[[AdapterSet], Any]] = {
    "arrow": AdapterSet.to_arrow,
    "frame": AdapterSet.to_frame,
    "dataset": AdapterSet.to_dataset,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [(1, 1), (4, 4), (1, 4, 2)], ids=str)
def test_round_trip_is_exact(way: str, ranks: tuple[int, ...]) -> None:
    made = adapters(ranks)
    back = adapters_from(WAYS[way](made), made.card)
    assert back.layout == made.layout
    assert back.weights.dtype == np.float32
    assert np.array_equal(back.weights, made.weights)
    assert back.rows.to_pylist() == made.rows.to_pylist()
    assert back.card == made.card


@pytest.mark.parametrize("way", WAYS)
def test_a_column_of_any_table_is_the_label(way: str) -> None:
    back = adapters_from(WAYS[way](adapters((4,)).select([0, 1, 3, 4])))
    codes, names = Classification().read(back, "category_label")
    assert [names[code] for code in codes] == ["cat", "dog", "cat", "dog"]
    targets, labels = MultiLabel().read(back, "labels")
    assert (labels, targets.tolist()) == (("a", "b"), [[1, 0], [0, 0], [0, 1], [0, 0]])
    with pytest.raises(DataError, match="rows without a label"):
        adapters_from(WAYS[way](adapters((4,)))).labels("category_label")


@pytest.mark.parametrize("way", WAYS)
def test_several_columns_of_any_table_are_several_labels(way: str) -> None:
    made = adapters((4,))
    made = replace(made, rows=made.rows.append_column("large", pa.array([0, 1, 1, 0, 1])))
    back = adapters_from(WAYS[way](made))
    targets, names = MultiLabel().read(back, "flagged,large")
    assert names == ("flagged", "large")
    assert targets.tolist() == [[1, 0], [0, 1], [1, 1], [1, 0], [0, 1]]


def test_named_classes_of_datasets_and_pandas_keep_their_names() -> None:
    table = adapters((2,)).to_dataset().remove_columns("category_label")
    codes = ["cat", "dog", None, "cat", "dog"]
    table = table.add_column("kind", [-1 if c is None else ["cat", "dog"].index(c) for c in codes])
    named = table.cast_column("kind", ClassLabel(names=["cat", "dog"]))
    assert adapters_from(named).rows["kind"].to_pylist() == codes
    frame = adapters((2,)).to_frame().astype({"category_label": "category"})
    back = adapters_from(frame).select([0, 1, 3])
    assert back.labels("category_label")[1] == ("cat", "dog")


def test_cells_of_a_frame_are_the_factors() -> None:
    made = adapters((4,))
    down, up = made.layer(PATH.format(0))
    frame = made.to_frame()
    assert np.array_equal(
        np.stack(frame[DOWN]),
        down,
    )
    assert np.array_equal(
        np.stack(frame[UP]),
        up,
    )


def test_a_filtered_and_shuffled_dataset_keeps_rows_together() -> None:
    made = adapters((1, 4))
    kept = made.to_dataset().filter(lambda row: row["count"] != 2).shuffle(seed=1)
    back = adapters_from(kept)
    order = back.column("count")
    assert sorted(order) == [0, 1, 3, 4]
    assert np.array_equal(back.weights, made.weights[order])


def test_a_part_of_a_collection_is_written_alone() -> None:
    made = adapters((2,)).select([4, 1])
    assert np.array_equal(adapters_from(made.to_arrow()).weights, made.weights)


def test_what_is_no_table_of_adapters_is_refused() -> None:
    with pytest.raises(DataError, match="expected rows with columns such as"):
        adapters_from(pa.table({"a": [1]}))
    with pytest.raises(DataError, match="expected a table of arrow, pandas or datasets, got list"):
        adapters_from([1])  # type: ignore[arg-type]
    frame = adapters((1,)).to_frame()
    frame.at[3, UP] = np.ones((3, 1))
    with pytest.raises(DataError, match=rf"row 3, column `{UP}`: expected a 2x1 matrix"):
        adapters_from(frame)
