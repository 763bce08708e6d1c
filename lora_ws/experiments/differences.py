"""Differences of experiments from published numbers, and from each other paired by seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import ttest_rel

from lora_ws.report.metrics import MISSING
from lora_ws.report.records import RunRecord, Summary

RESAMPLES, CONFIDENCE = 2000, 95


def interval(gaps: Float[np.ndarray, " rows"]) -> tuple[float, float]:
    """Interval of 95 % of a mean in percent, by a bootstrap over rows.

    Args:
        gaps: of each row, such as 1 where one reader is right and another is not.

    Example:
        >>> interval(np.zeros(8))
        (0.0, 0.0)
    """
    rows = np.random.default_rng(0).integers(len(gaps), size=(RESAMPLES, len(gaps)))
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(100 * gaps[rows].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


class Difference(NamedTuple):
    """Mean difference of a metric over paired seeds, in percent, and the p of a paired test."""

    mean: float
    p: float
    n: int

    def text(self) -> str:
        """Text for a table: a dash where no seed was measured in both."""
        if not self.n:
            return MISSING
        sign = "+" if self.mean >= 0 else "−"
        chance = f" (p {self.p:.0e})" if np.isfinite(self.p) else ""
        return f"{sign}{abs(self.mean):.1f}{chance}"


def paired(
    ours: Sequence[RunRecord], theirs: Sequence[RunRecord], metric: str = "accuracy"
) -> Difference:
    """Compare two experiments seed by seed (paired t-test, two-sided).

    The seeds share their test rows: p says whether training anew would repeat the difference on
    these rows, not whether other adapters would.

    Example:
        >>> paired([], []).n
        0
    """
    one, two = (
        {record.seed: record.test[metric] for record in records if metric in record.test}
        for records in (ours, theirs)
    )
    seeds = sorted(set(one) & set(two))
    gaps = 100 * np.array([one[seed] - two[seed] for seed in seeds])
    if not len(gaps):
        return Difference(float("nan"), float("nan"), 0)
    if len(gaps) < 2 or np.ptp(gaps) < 1e-12:
        # Equal gaps have no spread to test against: none at all, or a certain one.
        p = float("nan") if len(gaps) < 2 else float(abs(gaps[0]) < 1e-12)
        return Difference(float(gaps.mean()), p, len(gaps))
    p = float(ttest_rel(gaps, np.zeros_like(gaps)).pvalue)
    return Difference(float(gaps.mean()), p, len(gaps))


def gap(own: Sequence[RunRecord], top: Sequence[RunRecord], metric: str = "accuracy") -> str:
    """Text of how far an experiment is from another one, in percent.

    Paired by seed, with p, where both have several; else the difference of their means.

    Example:
        >>> gap([], [])
        '–'
    """
    values = [[r.test[metric] for r in rows if metric in r.test] for rows in (own, top)]
    if min(map(len, values)) != 1:
        return paired(own, top, metric).text()
    return Difference(100 * float(np.mean(values[0]) - np.mean(values[1])), float("nan"), 1).text()


def against_published(
    measured: Summary, published: tuple[float, float], tolerance: float
) -> tuple[bool, str]:
    """Whether a mean differs from a published one beyond the spread over seeds.

    Args:
        measured: over seeds, from 0 to 1.
        published: mean and standard deviation in percent.
        tolerance: how many standard deviations of the difference of two seeds are within it.

    Example:
        >>> against_published(Summary(0.42, 0.01, (0.42,)), (42.2, 1.2), 2.0)
        (False, 'within')
    """
    gap = 100 * measured.mean - published[0]
    spread = float(np.hypot(100 * measured.std, published[1]))
    differs = abs(gap) > tolerance * spread
    return differs, f"differs by {gap:+.1f}" if differs else "within"
