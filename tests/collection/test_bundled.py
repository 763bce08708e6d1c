"""Collections inside the package: how exact they are, how large, and how they are expanded."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warm import Warm

from lora_ws.adapters import Layout
from lora_ws.collection import AdapterSet, DatasetCard, load
from lora_ws.collection.bundled import ASSETS, unpack, write_packed
from lora_ws.collection.card import find_card

CARD = DatasetCard(name="x", layout="tiny_sd_qv")
LAYOUT = Layout.known("tiny_sd_qv")


@pytest.fixture(scope="module")
def mini() -> AdapterSet:
    return load("lora-ws-mini")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.floats(-30, 30))
def test_error_is_small_against_each_matrix(tmp_path_factory, seed: int, exponent: float):
    rng = np.random.default_rng(seed)
    # Every matrix has its own magnitude, and its numbers spread over many.
    values = rng.standard_normal((3, LAYOUT.size)) * 10.0 ** rng.uniform(-6, 0, LAYOUT.size)
    for matrix in LAYOUT.matrices:
        values[:, matrix.columns] *= 10.0 ** (exponent * rng.uniform())
    zoo = AdapterSet(values.astype(np.float32), LAYOUT, pa.table({"k": range(3)}), CARD)
    again = unpack(write_packed(zoo, tmp_path_factory.mktemp("packed")), CARD)
    assert again.rows.equals(zoo.rows)
    for matrix in LAYOUT.matrices:
        before = zoo.weights[:, matrix.columns].astype(np.float64)
        error = np.abs(again.weights[:, matrix.columns] - before).max()
        assert error <= 2.5e-4 * np.abs(before).max()


def test_zero_matrices_stay_zero(tmp_path: Path):
    zoo = AdapterSet(np.zeros((2, LAYOUT.size), np.float32), LAYOUT, pa.table({"k": [0, 1]}), CARD)
    assert not unpack(write_packed(zoo, tmp_path), CARD).weights.any()


CORNERS = ("per_adapter/class", "per_adapter/constant", "shared/class", "shared/constant")


def test_mini_has_its_rows_and_subsets(mini: AdapterSet):
    assert len(mini) == find_card("lora-ws-mini").rows == 2000
    assert Counter(mini.column("subset").tolist()) == dict.fromkeys(CORNERS, 500)
    assert find_card("lora-ws-mini").subsets == CORNERS
    assert len(load("lora-ws-mini", subset="shared/class")) == 500
    assert set(Counter(mini.column("category_name").tolist()).values()) == {40}


def test_mini_corners_share_their_image_sets(mini: AdapterSet):
    images = [mini.subset(name).rows["images"].to_pylist() for name in CORNERS]
    assert all(other == images[0] for other in images[1:])


@pytest.mark.parametrize("name", ["lora-ws-mini", "lora-ws-mini-flagged"])
def test_corners_differ_in_what_they_say(name: str):
    zoo = load(name)
    down = [layer.down_shape for layer in zoo.layout.layers]
    assert len(down) == 64
    for subset in zoo.card.subsets:
        own = zoo.subset(subset)
        start, prompt = subset.split("/")
        first, _ = own.layer(zoo.layout.layers[0].name)
        assert (np.abs(first - first[0]).max() < 0.1) == (start == "shared")
        named = [row["category_label"] in row["prompt"].split() for row in own.rows.to_pylist()]
        assert all(named) if prompt == "class" else not any(named)


@pytest.mark.parametrize(
    ("name", "sizes"), [("lora-ws-mini", [350, 50, 100]), ("lora-ws-mini-flagged", [112, 16, 32])]
)
def test_parts_share_no_image_and_leaf_parts_no_leaf(name: str, sizes: list[int]):
    zoo = load(name)
    for subset in zoo.card.subsets:
        part = load(name, subset=subset)
        assert [len(rows) for rows in part.split()] == sizes
    for column, things in (("part", "images"), ("leaf_part", "category_name")):
        values = zoo.rows[things].to_pylist()
        listed = [set(v) if isinstance(v, list) else {v} for v in values]
        seen = [set().union(*(listed[k] for k in rows)) for rows in zoo.split_by(column).split()]
        assert sum(map(len, seen)) == len(set().union(*seen))


@pytest.mark.slow
def test_no_image_behind_an_adapter_was_seen_by_the_base(mini: AdapterSet):
    from lora_ws.diffusion.pipeline import base_facts

    seen = set(base_facts("tiny-sd")["photos"])
    assert len(seen) > 19_000
    assert seen.isdisjoint(image for row in mini.rows["images"].to_pylist() for image in row)


def test_flagged_is_half_and_has_five_images_each():
    zoo = load("lora-ws-mini-flagged")
    for subset in zoo.card.subsets:
        own = zoo.subset(subset)
        assert np.bincount(own.labels()[0]).tolist() == [80, 80]
        assert set(own.column("num_images").tolist()) == {5}
    assert set(zoo.where(label="flagged").column("category_label")) == {"flower"}


@pytest.mark.parametrize("name", ["lora-ws-mini", "lora-ws-mini-flagged"])
def test_recipe_of_a_bundled_collection_is_the_one_in_training(name: str):
    import yaml

    from lora_ws.config import spec_files

    recipe = load(name).manifest["recipe"]
    written = yaml.safe_load(
        spec_files("training")[f"zoo/{name.replace('-', '_')}"].read_text(encoding="utf-8")
    )
    assert recipe["base"] == "tiny-sd"
    assert recipe["photos"]["words"] == written["photos"]["words"]
    assert recipe["seed"] == written["seed"]
    assert written["sampling"].items() <= recipe["sampling"].items()
    assert recipe["finetune"]["steps"] == 200
    assert recipe["shard"] == "0/1"


@pytest.mark.parametrize("name", ["lora-ws-mini", "lora-ws-mini-flagged"])
def test_bundled_rows_are_finite_and_none_is_doubled(name: str):
    zoo = load(name)
    assert np.isfinite(zoo.weights).all()
    assert len({row.tobytes() for row in zoo.weights}) == find_card(name).rows


def test_mini_fits_into_the_package():
    files = [p for p in (ASSETS / "lora-ws-mini").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 30_000_000


@pytest.mark.slow
def test_first_use_by_several_processes_at_once(tmp_path: Path, mini: AdapterSet, warm: Warm):
    code = "import lora_ws; print(len(lora_ws.load('lora-ws-mini')))"
    jobs = [warm.start(code, LORA_WS_CACHE=str(tmp_path)) for _ in range(4)]
    assert [job.wait() for job in jobs] == [(0, "2000\n")] * 4
    (store,) = tmp_path.glob("stores/lora-ws-mini/*/manifest.json")
    assert np.array_equal(AdapterSet.open(store.parent).weights, mini.weights)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_interrupted_expansion_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: AdapterSet
):
    monkeypatch.setenv("LORA_WS_CACHE", str(tmp_path))
    load("lora-ws-mini")
    (store,) = tmp_path.glob("stores/lora-ws-mini/*/")
    partial = store.rename(store.with_name(store.name + ".partial"))
    (partial / "weights.npy").write_bytes(b"half")
    np.testing.assert_array_equal(load("lora-ws-mini").weights, mini.weights)
