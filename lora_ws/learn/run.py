"""Run an experiment: `run_one` seed, `run_many` seeds, or `run` a spec in a folder that resumes."""

import json
import logging
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger

from lora_ws.config import dump_yaml, to_plain
from lora_ws.errors import ConfigError
from lora_ws.learn.batched import Job, fit_batched
from lora_ws.learn.bundle import Bundle
from lora_ws.learn.classifier import KeepBest, LoraClassifier
from lora_ws.learn.data import FeatureData
from lora_ws.learn.engine import engine_of
from lora_ws.learn.features import Prepared, open_data, prepare
from lora_ws.learn.outcome import Fitted, Measured, computed, diverged, make_record
from lora_ws.learn.spec import ExperimentSpec, identity
from lora_ws.models import MLP
from lora_ws.report.plots import plot_confusion, plot_curves
from lora_ws.report.progress import progress
from lora_ws.report.records import RunRecord, append_record, read_records
from lora_ws.threads import threads

RECORDS, CONFIG, VERSIONS, BUNDLE = "records.jsonl", "config.yaml", "versions.json", "bundle"
LOCK, NO_BUNDLE, STATE = ".lock", "no_bundle.txt", ".state"


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
    """Train and evaluate several seeds on features made once."""
    with threads(spec.trainer.threads):
        prepared = prepare(spec)
    return [fitted.record for fitted in fit_seeds(spec, prepared, seeds)]


def run(spec: ExperimentSpec, out: Path) -> list[RunRecord]:
    """Run the seeds of a spec that its folder does not hold yet.

    The folder explains itself: ``config.yaml``, ``versions.json``, ``records.jsonl`` (one line a
    seed), ``seed-<k>/`` with curves and plots, and ``bundle/``, the classifier of the seed with the
    lowest validation loss.

    Args:
        spec: an experiment with one representation.
        out: its folder; made if missing, continued if it holds the same experiment.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"{out} is being run by another process; choose another --out") from error
    with lock:
        records = read_records(out / RECORDS)
        _check_same(spec, out, records)
        todo = [seed for seed in range(spec.seeds) if seed not in {r.seed for r in records}]
        if todo:
            with threads(spec.trainer.threads):
                prepared = prepare(spec)
            _describe(spec, out, records)
            records = _run_seeds(spec, prepared, out, records, todo)
    return sorted((r for r in records if r.seed < spec.seeds), key=lambda record: record.seed)


def _run_seeds(
    spec: ExperimentSpec, prepared: Prepared, out: Path, held: list[RunRecord], todo: list[int]
) -> list[RunRecord]:
    records = list(held)
    with progress(spec.name, spec.seeds, len(records)) as advance:
        for fitted in fit_seeds(spec, prepared, todo, out):
            for other in records[:1]:
                _check_data(fitted.record, other, out)
            _keep(fitted, prepared, out, records)
            records.append(fitted.record)
            advance(title=f"{spec.name} seed {fitted.record.seed}")
    return records


def fit_seeds(
    spec: ExperimentSpec, prepared: Prepared, seeds: Sequence[int], out: Path | None = None
) -> Iterator[Fitted]:
    """Train seeds by the engine that the spec asks for; curves go to folders below ``out``.

    The batched engine gives the first when all are trained, and keeps its state in ``out`` until
    the last was taken.
    """
    if engine_of(spec.trainer) == "one-by-one":
        for seed in seeds:
            yield fit_seed(spec, prepared, seed, out / f"seed-{seed}" if out else None)
        return
    state = out / STATE if out else None
    for fitted in fit_batched([Job(spec, prepared, seed) for seed in seeds], checkpoint=state):
        if out:
            (curves,) = _loggers(spec, out / f"seed-{fitted.record.seed}")
            for step, entry in enumerate(fitted.history):
                curves.log_metrics({**entry, "epoch": step}, step)
            curves.save()
        yield fitted
    if state:
        shutil.rmtree(state)


def fit_seed(
    spec: ExperimentSpec, prepared: Prepared, seed: int, folder: Path | None = None
) -> Fitted:
    """Train one classifier, restore its best epoch, and measure it on the test rows once."""
    start = time.perf_counter()
    data = FeatureData(
        prepared.features, prepared.labels, prepared.split, spec.fit.batch_size, seed
    )
    with _quiet(), threads(spec.trainer.threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(prepared.features.shape[1], len(prepared.classes), spec.fit.hidden)
        classifier = LoraClassifier(
            model, prepared.mean, prepared.scale, len(prepared.classes), spec.fit
        )
        best = KeepBest()
        trainer = _trainer(spec, best, folder)
        device = trainer.strategy.root_device.type
        try:
            trainer.fit(classifier, datamodule=data)
        except SystemExit as stop:
            # Lightning makes an exit of a signal or Ctrl-C, which would look like success.
            raise KeyboardInterrupt from stop
        finally:
            _close(spec)
        if not best.epoch:
            raise diverged(f"{spec.name}, seed {seed}")
        val = measure(classifier, data.val_dataloader(), trainer)
        test = measure(classifier, data.test_dataloader(), trainer)
    engine, seconds = f"lightning-{device}", time.perf_counter() - start
    record = make_record(
        spec, prepared, seed, best.history, val, test, engine=engine, seconds=seconds
    )
    return Fitted(record, classifier, best.history)


def measure(classifier: LoraClassifier, batches: Any, trainer: L.Trainer) -> Measured:
    """The metrics and the confusion matrix of a classifier on some rows."""
    classifier.metrics.reset()
    trainer.test(classifier, batches, verbose=False)
    return computed(classifier.metrics)


def _trainer(spec: ExperimentSpec, best: KeepBest, folder: Path | None) -> L.Trainer:
    stop = EarlyStopping("val_loss", patience=spec.fit.patience, mode="min")
    if spec.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator: expected a GPU for `gpu`, found none; use auto")
    return L.Trainer(
        accelerator=spec.trainer.accelerator,
        devices=spec.trainer.devices,
        max_epochs=spec.fit.max_epochs,
        callbacks=[best, stop],
        logger=_loggers(spec, folder) if folder else False,
        default_root_dir=folder,
        # The features are in memory and the model is small: checks and bars cost more than steps.
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1_000_000,
    )


def _loggers(spec: ExperimentSpec, folder: Path) -> list[Logger]:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*"):
        if stale.is_file():
            stale.unlink()
    loggers: list[Logger] = [CSVLogger(folder.parent, name="", version=folder.name)]
    if spec.trainer.wandb != "off":
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(
            WandbLogger(
                project="lora_ws",
                group=f"{spec.dataset} {spec.name}",
                name=folder.name,
                save_dir=folder,
                offline=spec.trainer.wandb == "offline",
            )
        )
    return loggers


def _close(spec: ExperimentSpec) -> None:
    """End the tracked run, so that the next seed gets one of its own."""
    if spec.trainer.wandb != "off":
        import wandb

        wandb.finish()


def _keep(fitted: Fitted, prepared: Prepared, out: Path, records: list[RunRecord]) -> None:
    """Plots and, for the best seed so far, the bundle; the record last, as it closes the seed.

    A representation that no bundle can hold costs the bundle, not the seed.
    """
    record, folder = fitted.record, out / f"seed-{fitted.record.seed}"
    plot_curves(fitted.history, record.best_epoch, folder / "curves.png")
    plot_confusion(record.confusion, record.classes, folder / "confusion.png")
    if all(record.val_loss < other.val_loss for other in records):
        try:
            Bundle.build(prepared, fitted.classifier, record).save(out / BUNDLE)
        except ConfigError as error:
            (out / NO_BUNDLE).write_text(f"{error}\n")
    append_record(out / RECORDS, record)


def _check_same(spec: ExperimentSpec, out: Path, records: list[RunRecord]) -> None:
    """Refuse a folder whose records come from another experiment or other data."""
    file = out / CONFIG
    if not records or not file.is_file():
        return
    held, now = yaml.safe_load(file.read_text()) or {}, identity(spec)
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
        (out / VERSIONS).write_text(json.dumps(_versions(), indent=1))


def _versions() -> dict[str, str]:
    names = ("lora_ws", "torch", "lightning", "torchmetrics", "scikit-learn", "numpy", "scipy")
    facts = {name: version(name) for name in names}
    facts |= {"python": platform.python_version(), "platform": platform.platform()}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
        facts["commit"] = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["commit"] = "unknown (not a git checkout)"
    return facts


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notes on hardware and logging intervals say nothing about an experiment."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec")
            yield
    finally:
        logger.setLevel(before)


def best_run(groups: dict[str, list[RunRecord]]) -> str:
    """The experiment with the highest mean validation AUROC; test rows have no say.

    AUROC, because accuracy on few validation rows cannot tell experiments apart.
    """
    return max(groups, key=lambda name: np.mean([r.val["auroc"] for r in groups[name]]))
