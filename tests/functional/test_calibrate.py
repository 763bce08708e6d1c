"""Calibration against torch, torchmetrics and scikit-learn; coverage on simulated rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from tolerances import rounding
from torchmetrics.functional.classification import multiclass_calibration_error

from lora_ws.errors import ConfigError
from lora_ws.functional.calibrate import (
    conformal_sets,
    conformal_threshold,
    energy,
    expected_calibration_error,
    fit_temperature,
    threshold_at,
)


def simulated(rows: int, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn by the probabilities that they mean."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((rows, classes))
    gumbel = rng.gumbel(size=logits.shape)
    return logits, (logits + gumbel).argmax(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_temperature_is_that_of_torch(factor: float, smoothing: float) -> None:
    logits, labels = simulated(300)
    wide, truth = torch.from_numpy(factor * logits), torch.from_numpy(labels)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [log_t],
        max_iter=200,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def step() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            wide / log_t.exp(), truth, label_smoothing=smoothing
        )
        loss.backward()
        return loss

    solver.step(step)  # type: ignore[arg-type]
    found = fit_temperature(factor * logits, labels, smoothing=smoothing)
    # The place of a minimum is known to no more than the root of eps, 1.5e-8.
    assert found == pytest.approx(float(log_t.detach().exp()), rel=1e-6)


def test_temperature_finds_the_factor_that_was_put_on_honest_logits() -> None:
    logits, labels = simulated(20_000)
    # A row tells as much of the logarithm of the temperature as its logits vary under its own
    # probabilities (Fisher): five standard deviations of the best estimate.
    values = softmax(logits)
    information = (values * logits**2).sum() - ((values * logits).sum(1) ** 2).sum()
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=5 / information**0.5)


def test_smoothing_keeps_right_rows_from_promising_certainty() -> None:
    logits = np.array([[3.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    labels = np.array([0, 1, 0])
    sharp, honest = (fit_temperature(logits, labels, smoothing=s) for s in (0.0, 0.25))
    assert softmax(logits / sharp).max() > 1 - 1e-9
    assert softmax(logits / honest).max() < 0.99


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_calibration_error_is_that_of_torchmetrics(bins: int, factor: float) -> None:
    logits, labels = simulated(500)
    values = softmax(factor * logits)
    expected = multiclass_calibration_error(
        torch.from_numpy(values), torch.from_numpy(labels), 5, n_bins=bins, norm="l1"
    )
    # torchmetrics sums the rows of a bin in float32.
    found = expected_calibration_error(values, labels, bins).error
    assert found == pytest.approx(float(expected), abs=rounding(len(values)))


def test_reliability_table_is_that_of_scikit_learn() -> None:
    logits, labels = simulated(500)
    values = softmax(logits)
    found = expected_calibration_error(values, labels, 12)
    hits = values.argmax(1) == labels
    right, sure = calibration_curve(hits, values.max(1), n_bins=12)
    some = found.counts > 0
    np.testing.assert_allclose(found.accuracy[some], right)
    np.testing.assert_allclose(found.confidence[some], sure)
    assert np.isnan(found.accuracy[~some]).all()
    assert found.counts.sum() == 500


def test_certain_rows_fall_into_the_last_bin() -> None:
    found = expected_calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0]), 4)
    assert found.counts.tolist() == [0, 0, 0, 2]
    assert found.error == pytest.approx(0.5)


def test_energy_is_that_of_torch() -> None:
    logits, _ = simulated(50)
    expected = -torch.from_numpy(logits).logsumexp(1).numpy()
    np.testing.assert_allclose(energy(logits), expected)


@given(
    scores=st.lists(st.integers(0, 30), min_size=1, max_size=60), rate=st.sampled_from([0.05, 0.2])
)
@settings(deadline=None, max_examples=80)
def test_threshold_leaves_out_a_new_row_as_seldom_as_promised(
    scores: list[int], rate: float
) -> None:
    # A new row is equally likely to be any of n + 1: take each in turn as the new one.
    bag = [*scores, 31]
    flagged = sum(
        new > threshold_at(np.array(bag[:k] + bag[k + 1 :], float), rate)
        for k, new in enumerate(bag)
    )
    assert flagged <= rate * len(bag) + 1e-9


def test_threshold_is_no_higher_than_the_promise_needs() -> None:
    scores = np.random.default_rng(0).permutation(99).astype(float)
    assert (scores > threshold_at(scores, 0.05)).sum() == 4  # 5 of 100, one of them the new row
    assert threshold_at(scores[:18], 0.05) == np.inf
    assert threshold_at(scores[:19], 0.05) == scores[:19].max()


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_conformal_sets_hold_the_true_class_as_often_as_promised(
    alpha: float, factor: float
) -> None:
    logits, labels = simulated(60_000, seed=1)
    values = softmax(factor * logits)
    held = []
    for start in range(0, 60_000, 300):  # 100 rows to fit on, 200 to test
        known, new = slice(start, start + 100), slice(start + 100, start + 300)
        threshold = conformal_threshold(values[known], labels[known], alpha)
        sets = conformal_sets(values[new], threshold)
        held.append(sets[np.arange(200), labels[new]].mean())
    # Exactly ceil(101 (1 - alpha)) / 101 on average over draws, as there are no ties.
    expected = np.ceil(101 * (1 - alpha)) / 101
    assert np.mean(held) == pytest.approx(expected, abs=4 * np.std(held) / len(held) ** 0.5)


def test_conformal_sets_of_few_rows_hold_every_class() -> None:
    logits, labels = simulated(8)
    values = softmax(logits)
    threshold = conformal_threshold(values, labels, 0.1)
    assert threshold == 1
    assert conformal_sets(values, threshold).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_temperature(np.zeros((0, 2)), np.zeros(0, int)), "at least one row"),
        (lambda: fit_temperature(np.zeros((3, 2)), np.zeros(2, int)), "labels of the same rows"),
        (lambda: expected_calibration_error(np.eye(2), np.arange(2), 0), "at least 1 bin"),
        (lambda: threshold_at(np.zeros(3), 0.0), "above 0 and below 1"),
        (lambda: conformal_threshold(np.eye(2), np.arange(2), 1.0), "above 0 and below 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
