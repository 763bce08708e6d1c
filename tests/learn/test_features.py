"""Which rows an experiment trains, validates and tests on."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from factories import small_zoo
from sklearn.base import BaseEstimator
from tolerances import rounding

from lora_ws.errors import ConfigError, DataError
from lora_ws.featurizers import DeltaPCA, StatsFlatVec, UpdateKernel
from lora_ws.functional.rows import Rows
from lora_ws.learn.features import represent, split_rows
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.memory import LIMIT

# Rows of small_zoo are cat, dog and owl in turn.
CATS, DOGS, OWLS = range(0, 90, 3), range(1, 90, 3), range(2, 90, 3)


def test_a_class_of_two_is_named() -> None:
    few = small_zoo().select([*CATS, *DOGS[:2], *OWLS])
    with pytest.raises(DataError, match="at least 3 adapters of each class, got 2 of `dog`"):
        split_rows(few, ExperimentSpec())


def test_a_single_class_is_refused() -> None:
    with pytest.raises(DataError, match="expected two classes or more, got only `cat`"):
        split_rows(small_zoo().select(list(CATS)), ExperimentSpec())


def test_a_class_that_training_never_sees_is_named() -> None:
    zoo = small_zoo()
    parts = np.full(90, "train", dtype=object)
    parts[::4], parts[1::4] = "val", "test"
    parts[OWLS] = "test"
    recorded = zoo.rows.append_column("part", [list(parts)])
    split = type(zoo)(zoo.weights, zoo.layout, recorded, zoo.card).split_by("part")
    with pytest.raises(
        DataError, match="training rows: expected at least 1 adapters of each class, got 0 of `owl`"
    ):
        split_rows(split, ExperimentSpec())


def test_features_in_a_file_are_deleted_once_nothing_maps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "160")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped, maps = [], Path("/proc/self/maps")

    def rmtree(folder: str, **options: bool) -> None:
        mapped.append(maps.is_file() and folder in maps.read_text(encoding="utf-8"))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    weights = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    features = represent(StatsFlatVec(), weights, np.array([1, 4, 7, 8, 0, 3]))
    np.testing.assert_array_equal(features, StatsFlatVec().fit_transform(weights))
    assert not mapped
    assert len(list(tmp_path.rglob("features"))) == 1
    del features
    assert mapped == [False], "Windows deletes no file that is mapped"


class Keeps(BaseEstimator):
    """Holds the rows it was fitted on, as nearest neighbours do."""

    def fit(self, rows: np.ndarray, y: np.ndarray | None = None) -> "Keeps":
        return self

    def transform(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, :2]


def test_a_transformer_that_wants_all_rows_is_refused_where_memory_does_not_hold_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = np.ones((9, 5), np.float32)
    assert represent(Keeps(), weights, np.arange(6)).shape == (9, 2)
    monkeypatch.setenv(LIMIT, "160")
    with pytest.raises(ConfigError, match=r"Keeps: expected training rows.*--memory_limit"):
        represent(Keeps(), weights, np.arange(6))


@pytest.mark.parametrize("kind", [DeltaPCA, UpdateKernel])
@pytest.mark.parametrize("landmarks", [None, 7])
def test_kernels_read_the_rows_of_a_store_in_blocks(
    kind: type[DeltaPCA | UpdateKernel],
    landmarks: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zoo = small_zoo()
    weights, train = np.array(zoo.weights), np.r_[40:70, 3:9]
    np.save(tmp_path / "weights.npy", weights)
    stored = np.load(tmp_path / "weights.npy", mmap_mode="r")
    labels = np.arange(len(train)) % 3

    def made(rows: np.ndarray) -> np.ndarray:
        featurizer = kind(layout=zoo.layout, landmarks=landmarks, kernel="left+delta")
        return represent(featurizer, rows, train, labels)

    expected, read = made(weights), []
    of_rows = Rows.__getitem__

    def counted(self: Rows, part: object) -> np.ndarray:
        found = of_rows(self, part)
        read.append(len(found))
        return found

    monkeypatch.setattr(Rows, "__getitem__", counted)
    monkeypatch.setattr("lora_ws.featurizers.updates.BLOCK_ROWS", 8)
    got = made(stored)
    assert max(read) == 8
    atol = rounding(8 * zoo.layout.size, size=float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
