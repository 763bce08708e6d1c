"""Seeds of several experiments side by side: other processes train them, this one keeps them.

Records are written by the process that claimed the folders alone, in the order in which one process
would write them. So nothing is doubled, whichever process is killed; what was not kept is trained
again.
"""

import gc
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from lora_ws.errors import TrainingError
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.run import fit_seeds
from lora_ws.learn.run_folder import BUNDLE, RECORDS, Finished, RunWriter, describe_run, enter
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.report.progress import progress
from lora_ws.report.records import RunRecord, read_records
from lora_ws.threads import threads
from lora_ws.workers import current_engine


class Run(NamedTuple):
    """An experiment and its folder, claimed.

    Attributes:
        spec: the experiment.
        out: its folder.
        records: that it holds.
        todo: seeds without one.
    """

    spec: ExperimentSpec
    out: Path
    records: list[RunRecord]
    todo: list[int]


class Seed(NamedTuple):
    """A task: one seed of an experiment, for another process.

    Attributes:
        spec: the experiment, pickled: what a process prepared is of equal bytes.
        call: which call it belongs to; data may have changed since another one.
        out: folder of the run.
        seed: to train.
    """

    spec: bytes
    call: str
    out: Path
    seed: int


def run_side_by_side(runs: Sequence[tuple[ExperimentSpec, Path]], processes: int) -> None:
    """Run the seeds that folders do not hold yet, as `run` does one after the other.

    Every process makes the representation for itself, once.

    Args:
        runs: experiments of one representation and one device each, and their folders.
        processes: how many seeds are trained at once.

    Raises:
        ConfigError: a folder holds another experiment.
        TrainingError: a seed failed, or ended its process twice; what was finished is kept.
    """
    if not runs:
        return
    with ExitStack() as held:
        entered = [_enter(spec, out, held) for spec, out in runs]
        seeds, total = list(_seeds(entered)), sum(run.spec.seeds for run in entered)
        with progress("seeds", total, total - len(seeds)) as advance:
            batches = ([seed] for _, seed in seeds)
            found = current_engine().map_batches(_train, batches, processes, _lost)
            for (run, seed), (finished,) in zip(seeds, found, strict=True):
                run.records.append(RunWriter(run.out, full=True).keep(finished, run.records))
                advance(title=f"{run.spec.name} seed {seed.seed}")
        for run in entered:
            RunWriter(run.out, full=True).draw(run.records, again=bool(run.todo))
            # Of processes that outlived a command which was killed.
            for unused in run.out.glob(f"seed-*/{BUNDLE}-*"):
                shutil.rmtree(unused, ignore_errors=True)


def _enter(spec: ExperimentSpec, out: Path, held: ExitStack) -> Run:
    records = enter(spec, out, held)
    todo = [seed for seed in range(spec.seeds) if seed not in {r.seed for r in records}]
    if todo:
        describe_run(spec, out, records)
    return Run(spec, out, records, todo)


def _seeds(runs: Sequence[Run]) -> Iterator[tuple[Run, Seed]]:
    call = uuid4().hex
    for run in runs:
        spec = pickle.dumps(run.spec)
        yield from ((run, Seed(spec, call, run.out, seed)) for seed in run.todo)


def _train(seeds: list[Seed]) -> list[Finished]:
    return [_finish(*seed) for seed in seeds]


def _finish(pickled: bytes, call: str, out: Path, seed: int) -> Finished:
    spec, prepared = _prepared(pickled, call)
    (fitted,) = fit_seeds(spec, prepared, [seed], out)
    finished = RunWriter(out, full=True).finish(fitted, read_records(out / RECORDS))
    # Trainers are circles of references, which would fill the memory.
    del fitted
    gc.collect()
    return finished


@lru_cache(maxsize=1)
def _prepared(pickled: bytes, _call: str) -> tuple[ExperimentSpec, Prepared]:
    """An experiment and its data: made once for all of its seeds that a process trains."""
    spec = pickle.loads(pickled)
    with threads(spec.trainer.threads):
        return spec, prepare(spec)


def _lost(seed: Seed) -> Finished:
    raise TrainingError(
        f"{seed.out}, seed {seed.seed}: its process ended twice, killed or out of memory (what was "
        "finished is kept); with fewer --processes memory may do"
    )
