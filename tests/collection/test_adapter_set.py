"""`AdapterSet`: choosing rows, labels, splits, and stores on disk."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from factories import SMALL, SMALL_SIZE, weights

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.collection import AdapterSet, DatasetCard, SplitRule
from lora_ws.errors import DataError, LayoutError, NotAvailableError

LAYOUT = Layout(tuple(LayerSpec(*layer) for layer in SMALL))
N = 40


@pytest.fixture
def zoo() -> AdapterSet:
    rows = pa.table(
        {
            "category_label": [("dog", "cat")[k % 2] for k in range(N)],
            "set": [k // 4 for k in range(N)],
        }
    )
    return AdapterSet(weights(N), LAYOUT, rows, DatasetCard(name="z", classes=("dog", "cat")))


@pytest.fixture
def store(zoo: AdapterSet, tmp_path: Path) -> Path:
    return zoo.save(tmp_path / "store")


MASK = np.arange(N) % 3 == 0


@pytest.mark.parametrize(
    "index",
    [slice(3, 9), slice(None, None, 5), slice(-3, None), range(4), [7, 2, 2], [-1], [-2, -1], MASK],
    ids=str,
)
def test_select_takes_what_numpy_takes(zoo: AdapterSet, index):
    part = zoo.select(index)
    expected = np.arange(N)[index if isinstance(index, slice) else np.asarray(index)]
    np.testing.assert_array_equal(part.weights, zoo.weights[expected])
    assert part.rows["set"].to_pylist() == [k // 4 for k in expected]


@pytest.mark.parametrize("index", [slice(3, 9), range(3, 9), np.arange(N) < 5])
def test_contiguous_rows_stay_a_view(zoo: AdapterSet, index):
    assert np.shares_memory(zoo.select(index).weights, zoo.weights)


def test_views_of_a_store_stay_mapped(store: Path):
    part = AdapterSet.open(store).select(slice(2, 5))
    assert isinstance(part.weights, np.memmap)


@pytest.mark.parametrize("index", [[], slice(0, 0), np.zeros(N, bool)])
def test_empty_selection(zoo: AdapterSet, index):
    part = zoo.select(index)
    assert (len(part), part.rows.num_rows, part.weights.shape[1]) == (0, 0, SMALL_SIZE)


@pytest.mark.parametrize("index", [[N], [N - 1, N], [-N - 1]])
def test_rows_beyond_the_end_are_refused(zoo: AdapterSet, index):
    with pytest.raises(IndexError):
        zoo.select(index)


def test_mask_of_another_length_is_refused(zoo: AdapterSet):
    with pytest.raises(DataError, match="mask of 40 rows, got one of 3"):
        zoo.select(np.array([True, False, True]))


def test_where_combines_columns(zoo: AdapterSet):
    part = zoo.where(category_label="cat", set=2)
    np.testing.assert_array_equal(part.weights, zoo.weights[[9, 11]])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("category_label", "bird", "its values: dog, cat"), ("categry_label", "x", "did you mean")],
)
def test_where_says_what_there_is(zoo: AdapterSet, column: str, value: str, message: str):
    with pytest.raises(DataError, match=message):
        zoo.where(**{column: value})


def test_labels_follow_the_cards_order(zoo: AdapterSet):
    labels, classes = zoo.labels()
    assert classes == ("dog", "cat")
    np.testing.assert_array_equal(labels, np.arange(N) % 2)


def test_labels_of_another_column_are_sorted(zoo: AdapterSet):
    labels, classes = zoo.labels("set")
    assert classes == tuple(map(str, range(10)))
    np.testing.assert_array_equal(labels, np.arange(N) // 4)


def test_label_that_the_card_does_not_list_is_refused(zoo: AdapterSet):
    with pytest.raises(DataError, match=r"holds `cat`, which card `z` does not list"):
        replace(zoo, card=DatasetCard(name="z", classes=("dog",))).labels()


@pytest.mark.parametrize("values", [["a", None] * 20, [1, None] * 20])
def test_missing_label_is_refused(zoo: AdapterSet, values: list):
    rows = pa.table({"category_label": values})
    with pytest.raises(DataError, match="rows without a label"):
        replace(zoo, rows=rows, card=DatasetCard(name="z")).labels()


def test_layer_gives_the_factors(zoo: AdapterSet):
    down, up = zoo.layer(SMALL[1][0])
    assert (down.shape, up.shape) == ((N, 1, 6), (N, 7, 1))
    np.testing.assert_array_equal(np.hstack([down[:, 0], up[..., 0]]), zoo.weights[:, 7:])
    with pytest.raises(LayoutError, match="no layer `nowhere`"):
        zoo.layer("nowhere")


def test_split_uses_the_cards_group(zoo: AdapterSet):
    rows = pa.table({"category_label": [("dog", "cat")[k // 4 % 2] for k in range(N)]})
    rows = rows.append_column("set", zoo.rows["set"])
    card = DatasetCard(name="z", split=SplitRule((0.6, 0.2, 0.2), group="set"))
    parts = replace(zoo, rows=rows, card=card).split()
    assert [len(part) for part in parts] == [24, 8, 8]
    assert not set(parts.train // 4) & set(parts.test // 4)


@pytest.mark.parametrize(
    ("shape", "rows", "message"), [((N, 9), N, "expected weights"), ((N, SMALL_SIZE), 3, "one ta")]
)
def test_parts_must_fit(shape: tuple, rows: int, message: str):
    with pytest.raises((LayoutError, DataError), match=message):
        AdapterSet(np.zeros(shape, np.float32), LAYOUT, pa.table({"a": range(rows)}))


# On disk


def test_round_trip(zoo: AdapterSet, store: Path):
    again = AdapterSet.open(store)
    np.testing.assert_array_equal(np.load(store / "weights.npy"), zoo.weights)
    assert again.layout == zoo.layout
    assert again.card == zoo.card
    assert again.rows.select(zoo.rows.column_names).equals(zoo.rows)
    assert not again.weights.flags.writeable


def test_version_of_saved_arrays_follows_their_numbers(zoo: AdapterSet, tmp_path: Path):
    stores = [zoo, zoo, replace(zoo, weights=zoo.weights + 1)]
    versions = [
        AdapterSet.open(each.save(tmp_path / str(k))).version for k, each in enumerate(stores)
    ]
    assert versions[0] == versions[1] != versions[2]


def test_save_refuses_to_overwrite(zoo: AdapterSet, store: Path):
    with pytest.raises(DataError, match="exists already"):
        replace(zoo, weights=zoo.weights + 1).save(store)
    np.testing.assert_array_equal(AdapterSet.open(store).weights, zoo.weights)


def test_save_does_not_continue_what_another_set_began(zoo: AdapterSet, tmp_path: Path):
    zoo.save(tmp_path / "other").rename(tmp_path / "s.partial")
    head = {"origin": {"origin": "arrays"}, "fingerprint": LAYOUT.fingerprint}
    lines = [head, {"rows": N, "quarantine": []}]
    journal = tmp_path / "s.partial" / "journal.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    other = replace(zoo, weights=zoo.weights + 1)
    np.testing.assert_array_equal(
        AdapterSet.open(other.save(tmp_path / "s")).weights, other.weights
    )


def test_nothing_there_is_said(tmp_path: Path):
    with pytest.raises(NotAvailableError, match=r"is not an adapter store$"):
        AdapterSet.open(tmp_path / "absent")
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(NotAvailableError, match="unfinished import is: run it again"):
        AdapterSet.open(tmp_path / "begun")


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda store: (store / name).write_bytes(content)


def shortened(name: str) -> Callable[[Path], object]:
    return lambda store: (store / name).write_bytes((store / name).read_bytes()[:-7])


def fewer_rows(store: Path) -> None:
    np.save(store / "weights.npy", np.load(store / "weights.npy")[:-1])


DAMAGE = {
    "weights missing": lambda store: (store / "weights.npy").unlink(),
    "weights empty": replaced("weights.npy", b""),
    "weights cut": shortened("weights.npy"),
    "weights garbage": replaced("weights.npy", b"garbage" * 100),
    "weights of fewer rows": fewer_rows,
    "rows missing": lambda store: (store / "rows.parquet").unlink(),
    "rows cut": shortened("rows.parquet"),
    "layout cut": shortened("layout.json"),
    "layout of another kind": replaced("layout.json", b"[]"),
    "layout without layers": replaced("layout.json", b'{"layers": []}'),
    "layout of other shapes": replaced(
        "layout.json", json.dumps(Layout.known("tiny_sd_qv").to_dict()).encode()
    ),
    "manifest cut": shortened("manifest.json"),
    "manifest without rows": replaced("manifest.json", b"{}"),
    "card garbage": replaced("card.yaml", b"{a: [}"),
    "card empty": replaced("card.yaml", b""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, store: Path):
    DAMAGE[name](store)
    with pytest.raises(DataError, match="the store is damaged") as error:
        AdapterSet.open(store)
    assert str(error.value).startswith(str(store))


def test_cards_of_other_versions_are_read(store: Path):
    card = yaml.safe_load((store / "card.yaml").read_text(encoding="utf-8"))
    del card["citation"], card["split"]["group"]
    card |= {"from_the_future": 1, "split": card["split"] | {"new": 2}}
    (store / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    assert AdapterSet.open(store).card == DatasetCard(name="z", classes=("dog", "cat"))
    del card["split"]
    (store / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    assert AdapterSet.open(store).card.split == SplitRule()
