"""Differences: against scipy on explicit pairs, and against the rule for published numbers."""

from dataclasses import replace

import numpy as np
import pytest
from factories import record
from scipy.stats import ttest_1samp

from lora_ws.experiments.differences import against_published, gap, paired
from lora_ws.report.records import RunRecord, Summary


def with_accuracy(values: list[float]) -> list[RunRecord]:
    made = []
    for seed, value in enumerate(values):
        made.append(replace(record(seed), test={"accuracy": value}))
    return made


def test_paired_is_a_t_test_of_the_gaps_by_seed():
    rng = np.random.default_rng(0)
    one, two = rng.uniform(0.4, 0.6, 10), rng.uniform(0.3, 0.5, 10)
    # Records in another order are matched by seed all the same.
    found = paired(with_accuracy(list(one)), with_accuracy(list(two))[::-1])
    assert found.mean == pytest.approx(100 * (one - two).mean())
    assert found.p == pytest.approx(ttest_1samp(one - two, 0).pvalue)
    assert found.n == 10


def test_equal_runs_do_not_differ_and_a_constant_gap_is_certain():
    same = with_accuracy([0.5, 0.6])
    assert paired(same, same)[:2] == (0.0, 1.0)
    assert paired(with_accuracy([0.7, 0.8]), same)[:2] == (pytest.approx(20), 0.0)


def test_a_single_run_is_held_against_the_mean_of_several():
    top, low = with_accuracy([0.9, 0.8, 0.85]), with_accuracy([0.5, 0.45, 0.4])
    assert gap(low, top) == paired(low, top).text() != ""
    assert gap(low, top).startswith("−40.0 (p ")
    # Paired by seed, the first of these would be −40.0.
    assert gap(low[:1], top) == "−35.0"
    assert gap(top, low[:1]) == "+35.0"
    assert gap(low[:1], top, "auroc") == "–"


def test_one_seed_has_no_p():
    found = paired(with_accuracy([0.7]), with_accuracy([0.5]))
    assert np.isnan(found.p)
    assert found.text() == "+20.0"


@pytest.mark.parametrize(
    ("mean", "published", "differs"),
    [(0.50, (50.0, 1.0), False), (0.53, (50.0, 1.0), True), (0.47, (50.0, 1.0), True)],
)
def test_differing_from_a_published_number(mean, published, differs):
    # Spread of the difference: sqrt(1² + 1²) percent; two of these are 2.8.
    assert against_published(Summary(mean, 0.01, (mean,)), published, 2.0)[0] is differs
