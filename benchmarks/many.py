"""Many small classifiers (3 x 512) trained together, against one after another.

Compared on ``shared/class`` of lora-ws-mini (350 training rows):

* ours: `fit_batched`, all models in one stack;
* one by one: `fit_seed`, Lightning, as `lora_ws.run` does by default on a CPU.

Two jobs: the seeds of one row of the paper's table (StatsLayer, 896 features), and a sweep of one
experiment per matrix (its 7 statistics), few seeds each. A fixed number of epochs, so that both do
the same work; what is timed is the whole call, from initialisation to test metrics.

``--device cuda`` compares on a GPU, where a process that waits for it spends CPU seconds too.
Goals there: at least 8 times faster for the seeds, 50 times for the sweep. There is none on a CPU,
where one model already fills a core.
"""

from collections.abc import Sequence

import common
import numpy as np

from lora_ws.featurizers import StatsLayer
from lora_ws.functional.moments import STATISTICS
from lora_ws.learn.batched import fit_batched
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.result import Job
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec

ONE_BY_ONE = "one by one (Lightning)"


def one_by_one(jobs: Sequence[Job]) -> None:
    """A classifier after another."""
    for job in jobs:
        fit_seed(*job)


def of_matrix(prepared: Prepared, matrix: int) -> Prepared:
    """The experiment on the statistics of one matrix."""
    width = len(STATISTICS)
    part = np.s_[matrix * width : (matrix + 1) * width]
    return prepared.columns(part)


def compare(title: str, jobs: Sequence[Job], repeats: int, goal: float | None) -> None:
    """Run and print one job."""
    units = len(jobs) * jobs[0].spec.fit.max_epochs
    contenders = {
        common.OURS: common.timed(lambda: fit_batched(jobs), units),
        ONE_BY_ONE: common.timed(lambda: one_by_one(jobs), units),
    }
    costs = common.alternate(contenders, repeats)
    baselines = [common.Baseline(ONE_BY_ONE, goal)]
    common.show(title, "ms per model and epoch", costs, baselines)


def main() -> None:
    """Run and print."""
    more = {"device": "cpu", "models": 10, "matrices": 128, "seeds": 1, "epochs": 10}
    args = common.arguments(__doc__, repeats=3, **more)
    if args.quick:
        args.models, args.matrices, args.epochs = 2, 3, 2
    accelerator = "gpu" if args.device == "cuda" else "cpu"
    spec = ExperimentSpec(
        subset="shared/class",
        featurizer=StatsLayer(),
        fit=FitSpec(max_epochs=args.epochs, patience=10**6),
        trainer=TrainerSpec(accelerator=accelerator),
    )
    prepared = prepare(spec)
    rows = [Job(spec, prepared, seed) for seed in range(args.models)]
    matrices = [of_matrix(prepared, matrix) for matrix in range(args.matrices)]
    sweep = [Job(spec, part, seed) for part in matrices for seed in range(args.seeds)]
    for jobs in (rows[:1], sweep[:1]):  # libraries and devices start up once
        fit_batched(jobs)
        one_by_one(jobs)
    goal = 8 if accelerator == "gpu" and args.models == 10 else None
    title = f"Training {args.models} seeds in one stack, 896 features, {accelerator.upper()}"
    compare(title, rows, args.repeats, goal)
    goal = 50 if accelerator == "gpu" and args.matrices == 128 else None
    title = f"Sweep of {args.matrices} matrices, seeds: {args.seeds}, {accelerator.upper()}"
    compare(title, sweep, args.repeats, goal)
    common.facts("lightning", device=args.device, epochs=args.epochs, repeats=args.repeats)


if __name__ == "__main__":
    main()
