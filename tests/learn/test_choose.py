"""Candidates are every combination of the values to choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from sklearn.base import BaseEstimator
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from lora_ws.adapters import Layout
from lora_ws.config import to_plain
from lora_ws.errors import ConfigError
from lora_ws.featurizers import FlatVec, UpdateKernel
from lora_ws.learn.choose import best, candidates


@dataclass(frozen=True)
class Fit:
    lr: float = 1e-3


@dataclass(frozen=True)
class Spec:
    dataset: str = "lora-ws-mini"
    matrices: tuple[str, ...] | None = None
    featurizer: BaseEstimator | None = field(default_factory=UpdateKernel)
    model: BaseEstimator = field(default_factory=lambda: SVC(kernel="precomputed"))
    fit: Fit = field(default_factory=Fit)
    choose: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def test_every_combination_the_last_key_fastest() -> None:
    layout = Layout.known("tiny_sd_qv")
    spec = Spec(
        featurizer=UpdateKernel(layout=layout),
        choose={"featurizer.whiten": [None, 0.1], "model.C": [1, 10, 100]},
    )
    before = to_plain(spec)
    found = candidates(spec)
    pairs: list[tuple[Any, ...]] = [(None, 1), (None, 10), (None, 100), (0.1, 1), (0.1, 10)]
    pairs.append((0.1, 100))
    assert [tuple(candidate.values.values()) for candidate in found] == pairs
    for (whiten, c), candidate in zip(pairs, found, strict=True):
        made: Any = candidate.spec
        assert candidate.values == {"featurizer.whiten": whiten, "model.C": c}
        assert (made.featurizer.whiten, made.model.C) == (whiten, c)
        assert made.featurizer.layout is layout or made.featurizer.layout == layout
        assert made.model.kernel == "precomputed"
        assert not made.choose
        assert made.dataset == spec.dataset
    assert to_plain(spec) == before


def test_nothing_to_choose_is_the_spec_itself() -> None:
    (only,) = candidates(Spec())
    assert only.values == {}
    assert to_plain(only.spec) == to_plain(Spec())


def test_keys_go_into_specs_and_into_estimators_of_estimators() -> None:
    spec = Spec(
        model=make_pipeline(StandardScaler(), SVC()),
        choose={"fit.lr": [0.1], "matrices": [("*.up",)], "model": [SVC(C=7)]},
    )
    made: Any = candidates(spec)[0].spec
    assert (made.fit, made.matrices, made.model.C) == (Fit(0.1), ("*.up",), 7)
    (wrapped,) = candidates(Spec(model=OuterModel(SVC()), choose={"model.inner.C": [5]}))
    inner: Any = wrapped.spec.model
    assert inner.inner.C == 5


class OuterModel(BaseEstimator):
    def __init__(self, inner: BaseEstimator) -> None:
        self.inner = inner


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        ({"model.c": [1]}, r"choose\.model\.c: no `c` in SVC; expected one of C, "),
        ({"model.gama": [1]}, "no `gama` in SVC, did you mean `gamma`"),
        ({"fit.rl": [1]}, r"choose\.fit\.rl: no `rl` in Fit, did you mean `lr`"),
        ({"dataset": ["x"]}, "expected keys of model, featurizer, fit, matrices, got `dataset`"),
        ({"seeds": [1]}, "expected keys of"),
        ({"model.C": []}, r"choose\.model\.C: expected at least one value"),
        ({"model.C.more": [1]}, r"choose\.model\.C\.more: 1\.0 has no `more`"),
    ],
)
def test_wrong_choices_are_refused(choose: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        candidates(Spec(choose=choose))


def test_a_featurizer_left_out_has_no_parameters() -> None:
    with pytest.raises(ConfigError, match=r"choose\.featurizer\.whiten: None has no `whiten`"):
        candidates(Spec(featurizer=None, choose={"featurizer.whiten": [0.1]}))
    (other,) = candidates(Spec(featurizer=None, choose={"featurizer": [FlatVec()]}))
    assert isinstance(other.spec.featurizer, FlatVec)


@pytest.mark.parametrize(
    ("qualities", "number"),
    [
        ([0.5], 0),
        ([0.1, 0.9, 0.9], 1),
        ([float("nan"), -3.0, -4.0], 1),
        ([float("nan"), float("nan")], 0),
    ],
)
def test_the_best_is_the_first_of_the_highest(qualities: list[float], number: int) -> None:
    assert best(qualities) == number
