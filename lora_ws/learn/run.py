"""Run an experiment: `run_one` seed, `run_many` seeds, or `run` a spec in a folder that resumes."""

import gc
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from filelock import FileLock, Timeout

from lora_ws.bundle.confidence import Confidence
from lora_ws.config import dump_yaml, to_plain
from lora_ws.errors import ConfigError
from lora_ws.learn.batched import Job, fit_batched
from lora_ws.learn.calibration import fit_confidence
from lora_ws.learn.callbacks import KeepBest
from lora_ws.learn.data import FeatureData
from lora_ws.learn.engine import engine_of
from lora_ws.learn.estimators import fit_estimator_seed
from lora_ws.learn.features import Prepared, for_seed, open_data, prepare, prepare_once
from lora_ws.learn.module import LoraModule
from lora_ws.learn.pack import pack
from lora_ws.learn.quiet import quiet
from lora_ws.learn.ranks import Ranks, join
from lora_ws.learn.result import Fitted, Measured, computed, diverged, make_record
from lora_ws.learn.spec import ExperimentSpec, identity, read_identity
from lora_ws.learn.tasks import TASKS
from lora_ws.learn.trainer import checkpoint, close, engine, make_loggers, make_trainer
from lora_ws.models import Metanetwork
from lora_ws.report.plots import plot_confusion, plot_curves, plot_reliability
from lora_ws.report.progress import progress
from lora_ws.report.records import RunRecord, append_line, read_records
from lora_ws.threads import threads

RECORDS, CONFIG, VERSIONS, BUNDLE = "records.jsonl", "config.yaml", "versions.json", "bundle"
CURVES = "curves.jsonl"
LOCK, NO_BUNDLE, FEATURES, STATE = ".lock", "no_bundle.txt", ".features.npy", ".state"


class Keeper(NamedTuple):
    """Puts finished seeds into the folder of a run."""

    spec: ExperimentSpec
    prepared: Prepared
    out: Path
    full: bool

    def seed(self, fitted: Fitted, records: list[RunRecord]) -> RunRecord:
        """Plots, the bundle, curves; the record last, as it closes the seed."""
        record, folder = fitted.record, self.out / f"seed-{fitted.record.seed}"
        for other in records[:1]:
            _check_data(record, other, self.out)
        if self.full:
            plot_curves(fitted.history, record.best_epoch, folder / "curves.png")
            seen, confidence = for_seed(self.spec, self.prepared, record.seed), None
            if record.confusion:
                plot_confusion(record.confusion, record.classes, folder / "confusion.png")
            if seen.task.gives_probabilities:
                confidence = _fit_confidence(seen, fitted, folder / "reliability.png")
            if all(record.val_loss < other.val_loss for other in records):
                self._bundle(seen, fitted, confidence)
        append_line(self.out / CURVES, _curves(fitted))
        append_line(self.out / RECORDS, record.to_dict())
        for used in folder.glob("*.ckpt"):
            used.unlink()
        return record

    def _bundle(self, seen: Prepared, fitted: Fitted, confidence: Confidence | None) -> None:
        """A network or representation that no bundle can hold costs the bundle, not the seed."""
        try:
            pack(self.spec, seen, fitted, confidence, self.out / BUNDLE)
            (self.out / NO_BUNDLE).unlink(missing_ok=True)
        except ConfigError as error:
            (self.out / NO_BUNDLE).write_text(f"{error}\n", encoding="utf-8")


def _fit_confidence(seen: Prepared, fitted: Fitted, plot: Path) -> Confidence:
    """How far to believe the classifier, and a picture of it."""
    found = fit_confidence(seen, fitted.network)
    plot_reliability({"softmax": found.before, "calibrated": found.after}, plot)
    return found.confidence


def _curves(fitted: Fitted) -> dict[str, Any]:
    """What charts of a seed need: history, and for two classes the scores behind ROC curves."""
    line: dict[str, Any] = {"seed": fitted.record.seed, "curves": fitted.history}
    if len(fitted.record.classes) == 2:
        line["scores"] = fitted.test.scores[:, 1].tolist()
        line["truth"] = fitted.test.truth.tolist()
    return line


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
    """
    if spec.trainer.world > 1:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes: expected 1 without a folder, got "
            f"{spec.trainer.world}; use run(spec, out)"
        )
    with threads(spec.trainer.threads):
        prepared = prepare(spec)
    return [fitted.record for fitted in fit_seeds(spec, prepared, seeds)]


def run(
    spec: ExperimentSpec, out: Path, *, full: bool = True, prepared: Prepared | None = None
) -> list[RunRecord]:
    """Run the seeds of a spec that its folder does not hold yet.

    The folder explains itself: ``config.yaml``, ``versions.json``, ``records.jsonl`` and
    ``curves.jsonl`` (one line a seed), ``seed-<k>/`` with logs and plots, and ``bundle/``, the
    classifier of the seed with the lowest validation loss.

    Args:
        spec: an experiment with one representation.
        out: its folder; made if missing, continued if it holds the same experiment.
        full: also make logs, plots and the bundle; a sweep of thousands of seeds has no use for
            them.
        prepared: features made already, of this spec.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    out, ranks = Path(out), join(spec.trainer)
    with ExitStack() as held:
        records = ranks.first(lambda: _enter(spec, out, held))
        todo = [seed for seed in range(spec.seeds) if seed not in {r.seed for r in records}]
        if todo:
            if prepared is None:
                with threads(spec.trainer.threads):
                    prepared = prepare_once(spec, ranks, out / FEATURES)
            ranks.first(lambda: _describe(spec, out, records))
            keep = Keeper(spec, prepared, out, full)
            records = _run_seeds(keep, records, todo, ranks)
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
            records = _enter(spec, out, held)
            todo = [seed for seed in range(spec.seeds) if seed not in {r.seed for r in records}]
            if todo:
                with threads(spec.trainer.threads):
                    prepared = prepare(spec)
                _describe(spec, out, records)
                places.append((Keeper(spec, prepared, out, False), records, todo))
        jobs = [
            Job(keep.spec, for_seed(keep.spec, keep.prepared, seed), seed)
            for keep, _, todo in places
            for seed in todo
        ]
        finished = iter(fit_batched(jobs, checkpoint=state))
        for keep, records, todo in places:
            for _ in todo:
                records.append(keep.seed(next(finished), records))
    shutil.rmtree(state, ignore_errors=True)


def _enter(spec: ExperimentSpec, out: Path, held: ExitStack) -> list[RunRecord]:
    """Claim the folder until ``held`` closes, and read what it has."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        held.enter_context(lock)
    except Timeout as error:
        raise ConfigError(f"{out} is being run by another process; choose another --out") from error
    held.callback((out / FEATURES).unlink, missing_ok=True)
    records = read_records(out / RECORDS)
    check_same(spec, out, records)
    return records


def _run_seeds(
    keep: Keeper, held: list[RunRecord], todo: list[int], ranks: Ranks
) -> list[RunRecord]:
    spec, records = keep.spec, list(held)
    with progress(spec.name, spec.seeds, len(records), shown=ranks.rank == 0) as advance:
        for fitted in fit_seeds(spec, keep.prepared, todo, keep.out, full=keep.full):
            records.append(ranks.first(partial(keep.seed, fitted, records)))
            advance(title=f"{spec.name} seed {fitted.record.seed}")
            # Trainers are circles of references, which would fill the memory; looking for them
            # takes long beside a seed of a sweep.
            if keep.full:
                gc.collect()
    gc.collect()
    return records


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
        for seed in seeds:
            yield fit_seed(spec, prepared, seed, logs[seed])
        return
    state = out / STATE if out else None
    jobs = [Job(spec, for_seed(spec, prepared, seed), seed) for seed in seeds]
    for fitted in fit_batched(jobs, checkpoint=state):
        if folder := logs[fitted.record.seed]:
            (curves,) = make_loggers(spec, folder)
            for step, entry in enumerate(fitted.history):
                curves.log_metrics({**entry, "epoch": step}, step)
            curves.save()
        yield fitted
    if state:
        shutil.rmtree(state)


def fit_seed(
    spec: ExperimentSpec, prepared: Prepared, seed: int, folder: Path | None = None
) -> Fitted:
    """Train one network, restore its best epoch, and measure it on the test rows once."""
    prepared = for_seed(spec, prepared, seed)
    if not isinstance(spec.model, Metanetwork):
        return fit_estimator_seed(spec, prepared, seed)
    start, ranks = time.perf_counter(), join(spec.trainer)
    best = KeepBest(restore=spec.fit.weights == "best")
    data = FeatureData(
        prepared.features, prepared.labels, prepared.split, spec.fit.batch_size, seed, ranks
    )
    with quiet(), threads(spec.trainer.threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LoraModule(prepared.network(spec.model), prepared.task, spec.fit)
        trainer, start_from = make_trainer(spec, best, folder), None
        if folder:
            whole = [identity(spec), prepared.zoo.version]
            every = spec.trainer.epochs_to_checkpoint
            start_from = checkpoint(trainer, every, folder, whole, ranks)
        name = engine(trainer)
        _fit(spec, trainer, module, data, start_from)
        if not best.epoch:
            raise ranks.same(diverged(f"{spec.name}, seed {seed}"))
        val = measure(module, data.val_dataloader(), trainer)
        test = measure(module, data.test_dataloader(), trainer)
    seconds = time.perf_counter() - start
    record = make_record(
        spec, prepared, seed, best.history, val, test, engine=name, seconds=seconds
    )
    return Fitted(record, module.network, best.history, test)


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


def measure(module: LoraModule, batches: Any, trainer: L.Trainer) -> Measured:
    """The metrics and, of a classifier, the confusion matrix on some rows."""
    trainer.test(module, batches, verbose=False)
    return computed(module.task.metrics(), *module.tested)


def check_same(spec: ExperimentSpec, out: Path, records: list[RunRecord]) -> None:
    """Refuse a folder whose records come from another experiment or other data.

    Raises:
        ConfigError: they do; the message says in what.
    """
    file = out / CONFIG
    if not records or not file.is_file():
        return
    now = identity(spec)
    held = read_identity(file, now)
    for key in now:
        if held.get(key) != now[key]:
            old, new, leaf = held.get(key), now[key], key
            if isinstance(old, dict) and isinstance(new, dict):
                name = next(k for k in {**old, **new} if old.get(k) != new.get(k))
                old, new, leaf = old.get(name), new.get(name), f"{key}.{name}"
            raise ConfigError(
                f"{out} holds an experiment with another `{leaf}` ({old}, now {new}); "
                "choose another --out"
            )
    version = open_data(spec)[0].version
    if version != records[0].data_version:
        raise ConfigError(
            f"{out} was made from other data than `{spec.dataset}` holds now; choose another --out"
        )


def _check_data(record: RunRecord, other: RunRecord, out: Path) -> None:
    for name in ("layout", "classes", "n_train", "n_val", "n_test", "dim", "engine", "split"):
        if getattr(record, name) != getattr(other, name):
            raise ConfigError(
                f"{out} holds seeds with another {name} ({getattr(other, name)}, now "
                f"{getattr(record, name)}); choose another --out"
            )


def _describe(spec: ExperimentSpec, out: Path, records: list[RunRecord]) -> None:
    seeds = max([spec.seeds, *(record.seed + 1 for record in records)])
    dump_yaml({**to_plain(spec), "seeds": seeds, "out": None}, out / CONFIG)
    if not records:
        (out / VERSIONS).write_text(json.dumps(_versions(), indent=1), encoding="utf-8")


def _versions() -> dict[str, str]:
    names = ("lora_ws", "torch", "lightning", "torchmetrics", "scikit-learn", "numpy", "scipy")
    facts = {name: version(name) for name in names}
    facts |= {"python": platform.python_version(), "platform": platform.platform()}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, check=True, timeout=10, encoding="utf-8")
        facts["commit"] = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["commit"] = "unknown (not a git checkout)"
    return facts


def best_run(groups: dict[str, list[RunRecord]]) -> str:
    """The experiment with the highest mean validation AUROC or R²; test rows have no say.

    AUROC, because accuracy on few validation rows cannot tell experiments apart.
    """

    def quality(name: str) -> float:
        return float(np.mean([r.val[TASKS[r.task].selects] for r in groups[name]]))

    return max(groups, key=quality)
