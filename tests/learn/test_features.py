"""Which rows an experiment trains, validates and tests on."""

import numpy as np
import pytest
from factories import small_zoo

from lora_ws.errors import DataError
from lora_ws.learn.features import split_rows
from lora_ws.learn.spec import ExperimentSpec

# Rows of small_zoo are cat, dog and owl in turn.
CATS, DOGS, OWLS = range(0, 90, 3), range(1, 90, 3), range(2, 90, 3)


def test_a_class_of_two_is_named() -> None:
    few = small_zoo().select([*CATS, *DOGS[:2], *OWLS])
    with pytest.raises(DataError, match="at least 3 adapters of each class, got 2 of `dog`"):
        split_rows(few, ExperimentSpec())


def test_a_class_that_training_never_sees_is_named() -> None:
    zoo = small_zoo()
    parts = np.full(90, "train", dtype=object)
    parts[::4], parts[1::4] = "val", "test"
    parts[OWLS] = "test"
    recorded = zoo.rows.append_column("part", [list(parts)])
    split = type(zoo)(zoo.weights, zoo.layout, recorded, zoo.card).split_by("part")
    with pytest.raises(
        DataError, match="at least 1 adapters of each class to train on, got 0 of `owl`"
    ):
        split_rows(split, ExperimentSpec())
