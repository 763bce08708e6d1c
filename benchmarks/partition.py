"""Statistics of StatsLayer by the kernels that `lora-ws` has NumPy take, against its own choice.

NumPy sorts and selects by AVX-512 wherever there is any. AMD's Zen 4 is slow to store what such a
kernel keeps, so there `lora_ws.system.choose_numpy_kernels` leaves NumPy those for AVX2. Of other
processors both contenders are the same, and the ratio is 1.
"""

import os
from collections.abc import Callable

import common
import numpy as np

from lora_ws import Layout, StatsLayer, system

ROWS = 32
CHOSEN, OWN = "kernels as `lora-ws` starts", "NumPy's own choice"


def transform(turns: int, seed: int) -> Callable[[], object]:
    """Statistics of rows of rank-4 adapters, query and value of Stable Diffusion 1.5."""
    layout = Layout.sd15_qv(rank=4)
    rows = np.random.default_rng(seed).standard_normal((ROWS, layout.size), dtype=np.float32)
    stats = StatsLayer(layout=layout).fit(rows[:1])
    return lambda: [stats.transform(rows) for _ in range(turns)]


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=5)
    turns = 1 if args.quick else 40
    chosen = os.environ.get(system.DISABLED, "")

    def by(kernels: str) -> common.Contender:
        def timed() -> common.Cost:
            os.environ[system.DISABLED] = kernels  # the child reads it
            cost = common.in_child(transform, turns, args.seed)
            units = turns * ROWS
            return common.Cost(cost.cpu / units, cost.wall / units, cost.peak_mib)

        return timed

    costs = common.alternate({CHOSEN: by(chosen), OWN: by("")}, args.repeats)
    title = "StatsLayer of a rank-4 SD1.5 row"
    common.show(title, "ms", costs, [common.Baseline(OWN)], base=CHOSEN)
    common.facts(rows=ROWS, turns=turns, repeats=args.repeats)


if __name__ == "__main__":
    main()
