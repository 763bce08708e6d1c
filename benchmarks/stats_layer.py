"""StatsLayer and StatsFlatVec: summary statistics of the stored weights.

Compared, for a collection of Stable Diffusion 1.5 adapters in memory:

* ours: `StatsLayer` (statistics of each of the 128 matrices) and `StatsFlatVec` (of the whole
  vector);
* published way: torch reductions over every matrix of all rows, statistic by statistic: the five
  that the authors' scripts compute, and seven beside, with kurtosis and skew done likewise;
* best library: numpy's mean, std, partition and extremes, scipy's skew and kurtosis.

Goals, five statistics against five: 6 times faster than the published way by layer, 9 times of the
whole vector.
"""

from collections.abc import Sequence

import common
import numpy as np
import torch
from scipy import stats

from lora_ws import Featurizer, Layout, StatsFlatVec, StatsLayer
from lora_ws.functional.moments import STATISTICS

Blocks = Sequence[slice]
GOALS = {StatsLayer: 6.0, StatsFlatVec: 9.0}
PUBLISHED, LIBRARY = "published way (torch)", "numpy and scipy"


def published(weights: np.ndarray, blocks: Blocks, count: int) -> np.ndarray:
    """Torch reductions, one after another."""
    rows, found = torch.from_numpy(weights), []
    for block in blocks:
        values = rows[:, block]
        mean, std = values.mean(1), values.std(1)
        found += [mean, std, values.median(1).values, values.min(1).values, values.max(1).values]
        if count == 7:
            centred = values - mean[:, None]
            found += [(centred**4).mean(1) / std**4 - 3, (centred**3).mean(1) / std**3]
    return torch.stack(found, 1).numpy()


def library(weights: np.ndarray, blocks: Blocks, count: int) -> np.ndarray:
    """One function of numpy or scipy for each statistic."""
    found = []
    for block in blocks:
        values = weights[:, block]
        middle = (values.shape[1] - 1) // 2
        ratio = (values.shape[1] - 1) / values.shape[1]
        found += [values.mean(1), values.std(1, ddof=1)]
        found += [np.partition(values, middle, axis=1)[:, middle], values.min(1), values.max(1)]
        if count == 7:
            found += [stats.kurtosis(values, 1, fisher=False) * ratio**2 - 3]
            found += [stats.skew(values, 1) * ratio**1.5]
    return np.stack(found, 1)


def compare(featurizer: Featurizer, blocks: Blocks, weights: np.ndarray, repeats: int) -> None:
    """Check that all agree, then time them."""
    small, kind = weights[:4], type(featurizer)
    count = len(featurizer.get_params()["statistics"])
    mine = featurizer.fit_transform(small).reshape(4, -1, count)
    for other in (published, library):
        theirs = other(small, blocks, count).reshape(mine.shape)
        np.testing.assert_array_equal(mine[..., 2:5], theirs[..., 2:5])
        np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=5e-3)
    costs = common.alternate(
        {
            common.OURS: common.timed(lambda: featurizer.transform(weights)),
            PUBLISHED: common.timed(lambda: published(weights, blocks, count)),
            LIBRARY: common.timed(lambda: library(weights, blocks, count)),
        },
        repeats,
    )
    title = f"{kind.__name__}, {count} statistics, {len(weights):,} SD1.5 adapters"
    goal = GOALS[kind] if count == 5 else None
    baselines = [common.Baseline(PUBLISHED, goal), common.Baseline(LIBRARY)]
    common.show(title, "s", costs, baselines)


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    layout = Layout.sd15_qv()
    weights, _ = common.synthetic(100 if args.quick else 1000, args.seed)
    matrices = [matrix.columns for matrix in layout.matrices]
    for few in (STATISTICS[:5], STATISTICS):
        compare(StatsLayer(layout=layout, statistics=few), matrices, weights, args.repeats)
        compare(StatsFlatVec(statistics=few), [slice(None)], weights, args.repeats)
    print("\nMedians, minima and maxima are equal bit for bit in all three.")
    common.facts("scipy", n=len(weights), repeats=args.repeats)


if __name__ == "__main__":
    main()
