"""Verdicts on real adapters: what spells the same update, and what is no known adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tolerances import rounding

from lora_ws.adapters import Layout
from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import Prediction
from lora_ws.collection import AdapterSet, load
from lora_ws.featurizers import DeltaPCA, FlatVec
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.run import fit_seed, run
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import MLP

SUBSET = "per_adapter/class"
Factors = list[tuple[np.ndarray, np.ndarray]]


class Trained(NamedTuple):
    bundle: Bundle
    rows: np.ndarray
    labels: np.ndarray
    verdicts: list[Prediction]
    trained: np.ndarray


@pytest.fixture(scope="session")
def real() -> Trained:
    """A small bundle of the bundled adapters, and its verdicts on their test rows."""
    spec = ExperimentSpec(
        subset=SUBSET,
        featurizer=DeltaPCA(landmarks=512),
        model=MLP(hidden=(64,)),
        fit=FitSpec(max_epochs=20),
    )
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    bundle = make_bundle(fitted)
    rows = np.array(prepared.adapters.weights[prepared.split.test])
    labels = prepared.labels[prepared.split.test]
    trained = np.array(prepared.adapters.weights[prepared.split.train])
    return Trained(bundle, rows, labels, bundle.predict_batch(rows), trained)


def factors(rows: np.ndarray, layout: Layout) -> Factors:
    return [
        (rows[:, down].reshape(-1, *layer.down_shape), rows[:, up].reshape(-1, *layer.up_shape))
        for layer, down, up in layout.pairs()
    ]


def flat(pairs: Factors) -> np.ndarray:
    parts = [matrix.reshape(len(matrix), -1) for pair in pairs for matrix in pair]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rescaled(pairs: Factors) -> Factors:
    return [(down * np.float32(1e-6), up * np.float32(1e6)) for down, up in pairs]


def flipped(pairs: Factors) -> Factors:
    signs = np.random.default_rng(0).choice([-1, 1], size=(len(pairs), len(pairs[0][0]), 1, 1))
    return [(sign * down, sign * up) for sign, (down, up) in zip(signs, pairs, strict=True)]


def padded_mixed_and_projected(pairs: Factors, rank: int = 4) -> Factors:
    """Zero rows and columns to a rank of 4, mixed, and the nearest rank 1 of the update again."""
    rng, found = np.random.default_rng(0), []
    for down, up in pairs:
        more = ((0, 0), (0, rank - 1), (0, 0))
        wide = np.pad(down, more), np.pad(up, (more[0], more[2], more[1]))
        mixing = rng.standard_normal((len(down), rank, rank)) + 3 * np.eye(rank)
        update = (wide[1] @ mixing) @ (np.linalg.inv(mixing) @ wide[0])
        left, sizes, right = np.linalg.svd(update)
        root = np.sqrt(sizes[:, 0])[:, None, None]
        found.append((root * right[:, :1], left[:, :, :1] * root))
    return found


def rounded(dtype: torch.dtype) -> Callable[[Factors], Factors]:
    def change(pairs: Factors) -> Factors:
        return [
            (
                torch.from_numpy(down).to(dtype).float().numpy(),
                torch.from_numpy(up).to(dtype).float().numpy(),
            )
            for down, up in pairs
        ]

    return change


# The last mixes ranks by any invertible matrices, which scales and signs are.
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(rescaled, marks=pytest.mark.slow),
        pytest.param(flipped, marks=pytest.mark.slow),
        padded_mixed_and_projected,
    ],
)
def test_other_spellings_of_the_same_update_get_the_same_verdict(
    real: Trained, change: Callable[[Factors], Factors]
) -> None:
    rows = real.rows[::4]
    other = flat(change(factors(rows, real.bundle.layout)))
    assert np.abs(other - rows).max() > 0.01
    assert real.bundle.gauge == "invariant"
    verdicts = real.bundle.predict_batch(other, projected=True)
    for was, now in zip(real.verdicts[::4], verdicts, strict=True):
        assert now.label in (was.label, None)
        bound = rounding(real.bundle.layout.size, size=1 + abs(was.ood_score))
        assert now.confidence == pytest.approx(was.confidence, abs=bound)
        assert now.ood_score == pytest.approx(was.ood_score, abs=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_keep_their_verdict_or_lose_it(real: Trained, dtype: torch.dtype) -> None:
    other = flat(rounded(dtype)(factors(real.rows, real.bundle.layout)))
    verdicts = real.bundle.predict_batch(other)
    pairs = list(zip(real.verdicts, verdicts, strict=True))
    close = [(was, now) for was, now in pairs if was.label != now.label]
    # What rounding turns are coin flips: two classes of nearly the same probability.
    for was, now in close:
        first, second = list(was.probabilities.values())[:2]
        assert now.label is None or was.label is None or first - second < 0.02
    assert len(close) <= 3


def garbage(rows: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    noise, untrained = rng.standard_normal(rows.shape, dtype=np.float32), rows.copy()
    for matrix in layout.matrices:
        part = noise[:, matrix.columns]
        norms = np.linalg.norm(rows[:, matrix.columns], axis=1, keepdims=True)
        part *= norms / np.linalg.norm(part, axis=1, keepdims=True)
        if matrix.role == "up":
            untrained[:, matrix.columns] = 0
    return {
        "random weights of matched norms": noise,
        "real numbers out of place": np.roll(rows, 1, axis=1),
        "huge": 1e6 * noise,
        "constant": np.ones_like(rows),
        "zeros": np.zeros_like(rows),
        "untrained": untrained,
    }


def test_garbage_is_abstained_from(real: Trained) -> None:
    for name, rows in garbage(real.rows, real.bundle.layout).items():
        verdicts = real.bundle.predict_batch(rows)
        assert np.mean([verdict.label is None for verdict in verdicts]) > 0.97, name
        assert {v.reason for v in verdicts} <= {"out-of-distribution", "out-of-range", ""}
        assert all(
            (v.ood_score > 1) == (v.label is None) for v in verdicts if v.ood_score is not None
        )


def test_known_adapters_are_answered_and_answers_are_better_than_chance(real: Trained) -> None:
    answered = [v.label is not None for v in real.verdicts]
    # 4 of 100 are expected above the second highest of 50, with a spread of 3, and few far ones.
    assert sum(answered) >= 85
    names = np.array(real.bundle.classes)[real.labels]
    hits = [v.label == name for v, name in zip(real.verdicts, names, strict=True) if v.label]
    assert np.mean(hits) > 0.5


def test_training_adapters_are_known_too(real: Trained) -> None:
    # A kernel that has met them gives them features three times as large as any other's.
    answered = [v.label is not None for v in real.bundle.predict_batch(real.trained)]
    assert np.mean(answered) >= 0.9


def test_conformal_sets_hold_the_class_of_most_known_adapters(real: Trained) -> None:
    names = np.array(real.bundle.classes)[real.labels]
    held = [name in v.conformal_set for v, name in zip(real.verdicts, names, strict=True)]
    # 90 expected, with a spread of 5 from 50 validation and 100 test rows.
    assert np.mean(held) >= 0.75
    assert np.mean([len(v.conformal_set) for v in real.verdicts]) < 9


def test_probabilities_of_a_verdict_stand_in_order_and_sum_to_one(real: Trained) -> None:
    values = real.bundle.predict_proba(real.rows)
    for verdict, row in zip(real.verdicts, values, strict=True):
        given = list(verdict.probabilities.values())
        assert given == sorted(given, reverse=True)
        assert sum(given) == pytest.approx(1)
        assert verdict.confidence == given[0] == pytest.approx(row.max())


def test_the_card_states_what_the_test_rows_say(real: Trained) -> None:
    held = real.bundle.confidence.calibration
    assert held is not None
    names = np.array(real.bundle.classes)[real.labels]
    abstained = np.mean([v.label is None for v in real.verdicts])
    assert held.test["abstained"] == pytest.approx(abstained)
    right = np.mean([v.label == n for v, n in zip(real.verdicts, names, strict=True) if v.label])
    assert held.test["accuracy_answered"] == pytest.approx(right)
    assert f"| {100 * abstained:.2f} |" in real.bundle.model_card()


def test_rows_that_are_not_finite_are_abstained_from_and_leave_others_alone(real: Trained) -> None:
    rows = real.rows[:3].copy()
    rows[1, 5] = np.nan
    first, broken, last = real.bundle.predict_batch(rows)
    assert (broken.label, broken.reason, broken.ood_score) == (None, "not-finite", None)
    assert broken.conformal_set == tuple(broken.probabilities)
    for verdict, was in ((first, real.verdicts[0]), (last, real.verdicts[2])):
        assert (verdict.label, verdict.reason) == (was.label, was.reason)
        bound = rounding(real.bundle.layout.size)
        assert verdict.confidence == pytest.approx(was.confidence, abs=bound)


def test_unknown_concepts_are_stranger_than_known_ones(tmp_path: Path) -> None:
    """Two of ten classes are never shown; measured AUROC 0.82 over 20 draws."""
    zoo = load("lora-ws-mini", subset=SUBSET)
    names = zoo.column("category_label")
    hidden = np.isin(names, ["fish", "vehicle"])
    known = zoo.select(~hidden)
    part = known.column("part")
    store = AdapterSet(known.weights, known.layout, known.rows.append_column("fold", [part]))
    store.save(tmp_path / "known")
    spec = ExperimentSpec(
        str(tmp_path / "known"),
        split="fold",
        label="category_label",
        featurizer=DeltaPCA(),
        model=MLP(hidden=(8,)),
        fit=FitSpec(max_epochs=1),
    )
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    bundle = make_bundle(fitted)
    test = prepared.adapters.weights[prepared.split.test]
    usual, strange = (
        bundle.predict_arrays(rows).ood_scores for rows in (test, zoo.weights[hidden])
    )
    truth = np.r_[np.zeros(len(usual)), np.ones(len(strange))]
    assert roc_auc_score(truth, np.r_[usual, strange]) > 0.7


def test_raw_bundles_abstain_from_projected_weights(
    make_zoo: Callable[..., AdapterSet], tmp_path: Path
) -> None:
    store = make_zoo(n=120).save(tmp_path / "store")
    model, fit = MLP(hidden=(16,)), FitSpec(max_epochs=3)
    spec = ExperimentSpec(str(store), featurizer=FlatVec(), model=model, fit=fit, seeds=1)
    run(spec, tmp_path / "run")
    assert (tmp_path / "run" / "reliability.png").stat().st_size > 10_000
    bundle = Bundle.load(tmp_path / "run" / "bundle")
    assert bundle.gauge == "raw"
    rows = make_zoo(n=120).weights[:4]
    plain = bundle.predict_batch(rows)
    assert sum(verdict.label is not None for verdict in plain) >= 2
    assert {v.reason for v in bundle.predict_batch(rows, projected=True)} == {"projected"}
    some = bundle.predict_batch(rows, projected=[True, False, False, False])
    assert (some[0].label, some[0].reason) == (None, "projected")
    assert some[1:] == plain[1:]
