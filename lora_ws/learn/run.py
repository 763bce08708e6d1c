"""Run an experiment: `run_one` seed, `run_many` seeds, or `run` a spec in a folder that resumes."""

import gc
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError
from lora_ws.learn.augment import Augment
from lora_ws.learn.batched import fit_batched
from lora_ws.learn.callbacks import KeepBest
from lora_ws.learn.data import FeatureData, read_once
from lora_ws.learn.engine import engine_of
from lora_ws.learn.estimators import fit_estimator_seed
from lora_ws.learn.features import Prepared, for_seed, prepare, prepare_once
from lora_ws.learn.grid_search import GridSearch
from lora_ws.learn.module import LoraModule
from lora_ws.learn.quiet import quiet
from lora_ws.learn.ranks import Ranks, join
from lora_ws.learn.refit import refit
from lora_ws.learn.result import Fitted, Job, diverged, make_record
from lora_ws.learn.run_folder import FEATURES, STATE, RunWriter, describe_run, enter
from lora_ws.learn.spec import ExperimentSpec, identity
from lora_ws.learn.tasks import TASKS, Parts
from lora_ws.learn.trainer import (
    checkpoint,
    close,
    engine,
    flattens,
    log_history,
    make_trainer,
)
from lora_ws.models import Metanetwork
from lora_ws.report.progress import progress
from lora_ws.report.records import RunRecord
from lora_ws.threads import threads


def run_one(spec: ExperimentSpec, seed: int) -> RunRecord:
    """Train and evaluate one seed; equal arguments give equal records on the CPU.

    Example:
        >>> from lora_ws.featurizers import StatsFlatVec
        >>> from lora_ws.learn.spec import FitSpec
        >>> spec = ExperimentSpec(featurizer=StatsFlatVec(), fit=FitSpec(max_epochs=1))
        >>> run_one(spec, seed=0).epochs
        1
    """
    return run_many(spec, [seed])[0]


def run_many(spec: ExperimentSpec, seeds: Sequence[int]) -> list[RunRecord]:
    """Train and evaluate several seeds on features made once, in this process.

    Raises:
        ConfigError: the spec asks for several devices, whose ranks need a folder to share.

    Example:
        >>> from lora_ws import StatsFlatVec
        >>> from lora_ws.learn.spec import FitSpec
        >>> spec = ExperimentSpec(featurizer=StatsFlatVec(), fit=FitSpec(max_epochs=1))
        >>> [record.n_test for record in run_many(spec, seeds=[0])]
        [100]
    """
    if spec.trainer.world > 1:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes: expected 1 without a folder, got "
            f"{spec.trainer.world}; use run(spec, out)"
        )
    with threads(spec.trainer.threads):
        prepared = prepare(spec)
    return [fitted.record for fitted in fit_seeds(spec, prepared, seeds)]


def fit_shown(spec: ExperimentSpec, shown: AdapterSet, seed: int) -> Fitted:
    """Train one seed on adapters in memory, which need be no collection.

    Args:
        spec: how to read them; its dataset, subset and split have no say.
        shown: adapters, whose card says label and parts.
        seed: to train.

    Example:
        >>> from lora_ws import StatsFlatVec, load
        >>> from lora_ws.learn.spec import FitSpec
        >>> spec = ExperimentSpec(featurizer=StatsFlatVec(), fit=FitSpec(max_epochs=1))
        >>> shown = load("lora-ws-mini").subset("shared/class")
        >>> tuple(fit_shown(spec, shown, seed=0).test.scores.shape)
        (100, 10)
    """
    own = replace(spec, split=None)
    with threads(own.trainer.threads):
        prepared = prepare(own, (shown, ""))
    return next(fit_seeds(own, prepared, [seed]))


def run(
    spec: ExperimentSpec, out: Path, *, full: bool = True, prepared: Prepared | None = None
) -> list[RunRecord]:
    """Run the seeds of a spec that its folder does not hold yet; see `lora_ws.learn.run_folder`.

    Args:
        spec: an experiment with one representation.
        out: its folder; made if missing, continued if it holds the same experiment.
        full: also make logs, plots and the bundle; a sweep of thousands of seeds has no use for
            them.
        prepared: features made already, of this spec.

    Raises:
        ConfigError: the folder holds another experiment.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lora_ws import StatsFlatVec
        >>> from lora_ws.learn.spec import FitSpec
        >>> spec = ExperimentSpec(featurizer=StatsFlatVec(), fit=FitSpec(max_epochs=1), seeds=1)
        >>> with TemporaryDirectory() as out:
        ...     (record,) = run(spec, Path(out), full=False)
        >>> record.epochs
        1
    """
    out, ranks = Path(out), join(spec.trainer)
    with ranks.together(), ExitStack() as held:
        records = ranks.first(lambda: enter(spec, out, held))
        todo = [seed for seed in range(spec.seeds) if seed not in {r.seed for r in records}]
        if todo:
            if prepared is None:
                with threads(spec.trainer.threads):
                    prepared = prepare_once(spec, ranks, out / FEATURES)
            ranks.first(lambda: describe_run(spec, out, records))
            records = _run_seeds(spec, prepared, RunWriter(out, full), records, todo, ranks)
        ranks.first(lambda: RunWriter(out, full).draw(records, again=bool(todo)))
    return sorted((r for r in records if r.seed < spec.seeds), key=lambda record: record.seed)


def run_together(runs: Sequence[tuple[ExperimentSpec, Path]], state: Path) -> None:
    """Run several experiments as `run` does, the seeds of all in common stacks.

    Records and curves alone are kept, as in a sweep.

    Args:
        runs: experiments of the batched engine, and their folders.
        state: folder for the state of unfinished stacks; removed at the end.

    Raises:
        ConfigError: a folder holds another experiment.
    """
    with ExitStack() as held:
        places = []
        for spec, out in runs:
            records = enter(spec, out, held)
            todo = [seed for seed in range(spec.seeds) if seed not in {r.seed for r in records}]
            if todo:
                with threads(spec.trainer.threads):
                    prepared = prepare(spec)
                describe_run(spec, out, records)
                jobs = [Job(spec, for_seed(spec, prepared, seed), seed) for seed in todo]
                places.append((RunWriter(out, False), records, jobs))
        finished = iter(fit_batched([j for *_, jobs in places for j in jobs], checkpoint=state))
        for writer, records, jobs in places:
            for _ in jobs:
                records.append(writer.seed(next(finished), records))
    shutil.rmtree(state, ignore_errors=True)


def _run_seeds(
    spec: ExperimentSpec,
    prepared: Prepared,
    writer: RunWriter,
    held: list[RunRecord],
    todo: list[int],
    ranks: Ranks,
) -> list[RunRecord]:
    records = list(held)
    shown = progress(spec.name, spec.seeds, len(records), shown=ranks.rank == 0)
    with shown as advance, _little_garbage():
        for fitted in fit_seeds(spec, prepared, todo, writer.out, full=writer.full):
            records.append(ranks.first(partial(writer.seed, fitted, records)))
            advance(title=f"{spec.name} seed {fitted.record.seed}")
            # Trainers are circles of references, which would fill the memory.
            gc.collect()
    return records


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Have `gc.collect` look at what is new alone: all that was imported takes it half a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def fit_seeds(
    spec: ExperimentSpec,
    prepared: Prepared,
    seeds: Sequence[int],
    out: Path | None = None,
    *,
    full: bool = True,
) -> Iterator[Fitted]:
    """Train seeds by the engine that the spec asks for.

    The batched engine gives the first when all are trained, and keeps its state in ``out`` until
    the last was taken.

    Args:
        spec: the experiment.
        prepared: its data.
        seeds: which to train.
        out: folder of the run, if there is one.
        full: whether logs go to a folder of each seed in it.
    """
    logs = {seed: out / f"seed-{seed}" if out and full else None for seed in seeds}
    if engine_of(spec) == "one-by-one":
        yield from _one_by_one(spec, prepared, logs)
        return
    state = out / STATE if out else None
    jobs = [Job(spec, for_seed(spec, prepared, seed), seed) for seed in seeds]
    for fitted in fit_batched(jobs, checkpoint=state):
        log_history(fitted, logs[fitted.record.seed])
        yield fitted
    if state:
        shutil.rmtree(state)


def _one_by_one(
    spec: ExperimentSpec, prepared: Prepared, logs: Mapping[int, Path | None]
) -> Iterator[Fitted]:
    """A seed after another; where there is a choice to make, each seed makes its own."""
    search = GridSearch(spec, prepared)
    for seed, folder in logs.items():
        if spec.choose:
            fitted = search.fit_best(seed, fit_seed)
            log_history(fitted, folder)
        else:
            fitted = fit_seed(spec, prepared, seed, folder)
        yield refit(fitted) if spec.refit else fitted


def fit_seed(
    spec: ExperimentSpec, prepared: Prepared, seed: int, folder: Path | None = None
) -> Fitted:
    """Train one network, restore its best epoch, and measure it on the test rows once."""
    prepared = for_seed(spec, prepared, seed)
    if not isinstance(spec.model, Metanetwork):
        return fit_estimator_seed(spec, prepared, seed)
    start, ranks = time.perf_counter(), join(spec.trainer)
    best = KeepBest(restore=spec.fit.weights == "best")
    with quiet(), threads(spec.trainer.threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        augment = Augment(spec.augment, prepared.inputs.factors) if spec.augment else None
        network, trainer = prepared.network(spec.model), make_trainer(spec, best, folder)
        rows = prepared.features
        if augment is None and trainer.strategy.root_device.type == "cpu":
            rows = read_once(network, rows)
        size = spec.fit.batch_size
        data = FeatureData(rows, prepared.labels, prepared.split, size, seed, ranks)
        flat = flattens(network, trainer, augment)
        module = LoraModule(network, prepared.task, spec.fit, augment, flat)
        start_from = None
        if folder:
            whole = [identity(spec), prepared.adapters.version, flat]
            every = spec.trainer.epochs_to_checkpoint
            start_from = checkpoint(trainer, every, folder, whole, ranks)
        name = engine(trainer)
        _fit(spec, trainer, module, data, start_from)
        if not best.epoch:
            raise ranks.same(diverged(f"{spec.name}, seed {seed}"))
        parts = predictions(module, data, trainer)
        val, test = (prepared.task.measure(parts, part) for part in ("val", "test"))
    seconds = time.perf_counter() - start
    job = Job(spec, prepared, seed)
    record = make_record(job, best.history, val, test, engine=name, seconds=seconds)
    return Fitted(job, record, module.network, best.history, test)


def _fit(
    spec: ExperimentSpec,
    trainer: L.Trainer,
    module: LoraModule,
    data: FeatureData,
    start_from: Path | None,
) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start_from)
    except SystemExit as stop:
        if data.ranks.rank:
            raise
        # Lightning makes an exit of a signal or Ctrl-C, which would look like success.
        raise KeyboardInterrupt from stop
    finally:
        close(spec)


def predictions(module: LoraModule, data: FeatureData, trainer: L.Trainer) -> Parts:
    """Predictions and targets of any part, made once when they are asked for."""

    @cache
    def of(part: str) -> tuple[Tensor, Tensor]:
        trainer.test(module, data.part(getattr(data.split, part)), verbose=False)
        return module.tested

    return of


def best_run(groups: dict[str, list[RunRecord]]) -> str:
    """The experiment with the highest mean validation AUROC or R²; test rows have no say.

    AUROC, because accuracy on few validation rows cannot tell experiments apart.
    """

    def quality(name: str) -> float:
        return float(np.mean([r.val[TASKS[r.task].selects] for r in groups[name]]))

    return max(groups, key=quality)
