"""One optimiser step of the classifier on whole weight vectors: 99,648 features, batch of 32.

The first layer has 51 million weights; with gradient and both moments of Adam they take 778 MiB.
Compared, as the mean over the steps of an epoch with its validation:

* ours: `LoraModule` and `FeatureData` under the Lightning trainer that `lora_ws.run` makes;
* ours without Lightning: a plain loop of the same steps;
* published way: the authors' loop (see `published.py`), which logs nothing on whole vectors.

Peak memory is measured in fresh processes, on top of the features. Ours holds a copy of the best
epoch's weights (195 MiB) besides, which the published way does not keep.

Goal: at least 2 times faster than the published way.
"""

from collections.abc import Callable

import common
import torch
from mlp_epoch import Clock, Problem, as_published, epoch, lightning, plain

WIDTH, N_VAL = 99_648, 32
CONTENDERS = {
    common.OURS: lightning,
    "published way": as_published,
    "ours without Lightning": plain,
}


def fit(name: str, n: int, seed: int) -> Callable[[], None]:
    """Two epochs of a contender."""
    problem = Problem(n, N_VAL, WIDTH, seed)
    torch.manual_seed(0)
    return lambda: CONTENDERS[name](problem, 2, Clock())


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=3)
    n, epochs = (32, 1) if args.quick else (320, 2)
    steps = n // 32
    problem = Problem(n, N_VAL, WIDTH, args.seed)
    contenders = {
        name: lambda train=train: epoch(train, problem, epochs, 1, steps)
        for name, train in CONTENDERS.items()
    }
    costs = common.alternate(contenders, args.repeats)
    goal = common.Baseline("published way", 2)
    common.show("Step on whole weight vectors (99,648)", "ms per step", costs, [goal])
    if not args.quick:
        print("\n### Peak memory of a fit on whole weight vectors\n")
        peaks = {name: common.in_child(fit, name, 64, args.seed).peak_mib for name in CONTENDERS}
        common.print_table(["", "peak MiB"], [[name, f"{p:.0f}"] for name, p in peaks.items()])
    common.facts("lightning", n=n, n_val=N_VAL, repeats=args.repeats)


if __name__ == "__main__":
    main()
