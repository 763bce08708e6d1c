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
from lora_ws.collection.bundled import ASSETS, pack, unpack
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
    again = unpack(pack(zoo, tmp_path_factory.mktemp("packed")), CARD)
    assert again.rows.equals(zoo.rows)
    for matrix in LAYOUT.matrices:
        before = zoo.weights[:, matrix.columns].astype(np.float64)
        error = np.abs(again.weights[:, matrix.columns] - before).max()
        assert error <= 2.5e-4 * np.abs(before).max()


def test_zero_matrices_stay_zero(tmp_path: Path):
    zoo = AdapterSet(np.zeros((2, LAYOUT.size), np.float32), LAYOUT, pa.table({"k": [0, 1]}), CARD)
    assert not unpack(pack(zoo, tmp_path), CARD).weights.any()


def test_mini_has_its_rows_and_subsets(mini: AdapterSet):
    assert len(mini) == find_card("lora-ws-mini").rows == 1050
    subsets = Counter(mini.column("subset").tolist())
    assert subsets == {"per_adapter/class": 750, "shared/class": 300}
    assert len(load("lora-ws-mini", subset="shared/class")) == 300


def test_mini_subsets_share_their_image_sets(mini: AdapterSet):
    per_adapter = mini.where(subset="per_adapter/class").column("folder").tolist()
    shared = mini.where(subset="shared/class").column("folder").tolist()
    assert len(set(per_adapter)) == 750
    assert sorted(shared) == sorted(per_adapter[:300])


def test_mini_split_keeps_an_image_set_in_one_part(mini: AdapterSet):
    folders = mini.column("folder")
    sets = [set(folders[part]) for part in mini.split()]
    assert sum(map(len, sets)) == len(set(folders))
    labels, classes = mini.labels()
    assert sorted(np.bincount(labels).tolist()) == [105] * 10
    assert classes == find_card("lora-ws-mini").classes


def test_mini_is_finite_and_no_row_is_doubled(mini: AdapterSet):
    assert np.isfinite(mini.weights).all()
    assert len({row.tobytes() for row in mini.weights}) == 1050


def test_mini_fits_into_the_package():
    files = [p for p in (ASSETS / "lora-ws-mini").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 15_000_000


def test_first_use_by_several_processes_at_once(tmp_path: Path, mini: AdapterSet, warm: Warm):
    code = "import lora_ws; print(len(lora_ws.load('lora-ws-mini')))"
    jobs = [warm.start(code, LORA_WS_CACHE=str(tmp_path)) for _ in range(4)]
    assert [job.wait() for job in jobs] == [(0, "1050\n")] * 4
    (store,) = tmp_path.glob("stores/lora-ws-mini/*/manifest.json")
    assert np.array_equal(AdapterSet.open(store.parent).weights, mini.weights)
    assert not list(tmp_path.rglob("*.partial"))


def test_interrupted_expansion_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: AdapterSet
):
    monkeypatch.setenv("LORA_WS_CACHE", str(tmp_path))
    load("lora-ws-mini")
    (store,) = tmp_path.glob("stores/lora-ws-mini/*/")
    partial = store.rename(store.with_name(store.name + ".partial"))
    (partial / "weights.npy").write_bytes(b"half")
    np.testing.assert_array_equal(load("lora-ws-mini").weights, mini.weights)


def test_subsets_of_the_shipped_collection_agree_on_the_parts() -> None:
    zoo = load("lora-ws-mini")
    whole = zoo.split()
    folder = zoo.column("folder")
    train, test = set(folder[whole.train]), set(folder[whole.test])
    assert not train & test
    for subset, sizes in (("per_adapter/class", [525, 75, 150]), ("shared/class", [210, 30, 60])):
        part = load("lora-ws-mini", subset=subset)
        split = part.split()
        assert [len(rows) for rows in split] == sizes
        assert set(part.column("folder")[split.test]) <= test
        assert set(part.column("folder")[split.train]) <= train
