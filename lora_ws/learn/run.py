"""Run an experiment: `run_one` seed, `run_many` seeds, or `run` a spec in a folder that resumes."""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout

from lora_ws.config import dump_yaml, to_plain
from lora_ws.errors import ConfigError, TrainingError
from lora_ws.learn.bundle import Bundle
from lora_ws.learn.classifier import KeepBest, LoraClassifier
from lora_ws.learn.data import FeatureData
from lora_ws.learn.features import Prepared, open_data, prepare, prepare_once
from lora_ws.learn.quiet import quiet
from lora_ws.learn.ranks import Ranks, join
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.learn.trainer import checkpoint, close, engine, make_trainer
from lora_ws.models import MLP
from lora_ws.report.plots import plot_confusion, plot_curves
from lora_ws.report.progress import progress
from lora_ws.report.records import METRICS, RunRecord, append_record, read_records
from lora_ws.threads import threads

RECORDS, CONFIG, VERSIONS, BUNDLE = "records.jsonl", "config.yaml", "versions.json", "bundle"
LOCK, NO_BUNDLE, FEATURES = ".lock", "no_bundle.txt", ".features.npy"
PROTOCOL = "clean"


class Fitted(NamedTuple):
    """A finished seed: its record, its classifier, and its curves by epoch."""

    record: RunRecord
    classifier: LoraClassifier
    history: list[dict[str, float]]


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
    return [fit_seed(spec, prepared, seed).record for seed in seeds]


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
    out, ranks = Path(out), join(spec.trainer)
    with ExitStack() as held:
        records = ranks.first(lambda: _enter(spec, out, held))
        todo = [seed for seed in range(spec.seeds) if seed not in {r.seed for r in records}]
        if todo:
            with threads(spec.trainer.threads):
                prepared = prepare_once(spec, ranks, out / FEATURES)
            ranks.first(lambda: _describe(spec, out, records))
            records = _run_seeds(spec, prepared, out, records, todo, ranks)
    return sorted((r for r in records if r.seed < spec.seeds), key=lambda record: record.seed)


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
    _check_same(spec, out, records)
    return records


def _run_seeds(
    spec: ExperimentSpec,
    prepared: Prepared,
    out: Path,
    held: list[RunRecord],
    todo: list[int],
    ranks: Ranks,
) -> list[RunRecord]:
    records = list(held)
    with progress(spec.name, spec.seeds, len(records), shown=ranks.rank == 0) as advance:
        for seed in todo:
            fitted = fit_seed(spec, prepared, seed, out / f"seed-{seed}")

            def keep(fitted: Fitted = fitted) -> RunRecord:
                return _keep(fitted, prepared, out, records)

            records.append(ranks.first(keep))
            advance(title=f"{spec.name} seed {seed}")
    return records


def fit_seed(
    spec: ExperimentSpec, prepared: Prepared, seed: int, folder: Path | None = None
) -> Fitted:
    """Train one classifier, restore its best epoch, and measure it on the test rows once."""
    start, ranks, best = time.perf_counter(), join(spec.trainer), KeepBest()
    data = FeatureData(
        prepared.features, prepared.labels, prepared.split, spec.fit.batch_size, seed, ranks
    )
    with quiet(), threads(spec.trainer.threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(prepared.features.shape[1], len(prepared.classes), spec.fit.hidden)
        classifier = LoraClassifier(
            model, prepared.mean, prepared.scale, len(prepared.classes), spec.fit
        )
        trainer, start_from = make_trainer(spec, best, folder), None
        if folder:
            identity = [_identity(spec), prepared.zoo.version]
            every = spec.trainer.epochs_to_checkpoint
            start_from = checkpoint(trainer, every, folder, identity, ranks)
        name = engine(trainer)
        _fit(spec, trainer, classifier, data, start_from)
        if not best.epoch:
            told = f"{spec.name}, seed {seed}: the validation loss was never finite; lower fit.lr"
            raise ranks.same(TrainingError(told))
        val, _ = measure(classifier, data.val_dataloader(), trainer)
        test, confusion = measure(classifier, data.test_dataloader(), trainer)
    record = RunRecord(
        **_facts(spec, prepared),
        engine=name,
        seed=seed,
        epochs=trainer.current_epoch,
        best_epoch=best.epoch,
        val_loss=best.loss,
        val=val,
        test=test,
        confusion=confusion,
        seconds=time.perf_counter() - start,
    )
    return Fitted(record, classifier, best.history)


def _fit(
    spec: ExperimentSpec,
    trainer: L.Trainer,
    classifier: LoraClassifier,
    data: FeatureData,
    start_from: Path | None,
) -> None:
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=start_from)
    except SystemExit as stop:
        if data.ranks.rank:
            raise
        # Lightning makes an exit of a signal or Ctrl-C, which would look like success.
        raise KeyboardInterrupt from stop
    finally:
        close(spec)


def _facts(spec: ExperimentSpec, prepared: Prepared) -> dict[str, Any]:
    """What the records of all seeds share."""
    return {
        "name": spec.name,
        "representation": type(spec.featurizer).__name__,
        "dataset": prepared.zoo.card.name,
        "subset": prepared.subset,
        "data_version": prepared.zoo.version,
        "layout": prepared.zoo.layout.fingerprint,
        "protocol": PROTOCOL,
        "dim": prepared.features.shape[1],
        "classes": prepared.classes,
        "n_train": len(prepared.split.train),
        "n_val": len(prepared.split.val),
        "n_test": len(prepared.split.test),
        "feature_seconds": prepared.seconds,
        "split": spec.split or "",
    }


def measure(
    classifier: LoraClassifier, batches: Any, trainer: L.Trainer
) -> tuple[dict[str, float], tuple[tuple[int, ...], ...]]:
    """The metrics and the confusion matrix of a classifier on some rows."""
    trainer.test(classifier, batches, verbose=False)
    values = classifier.measured
    confusion = values["confusion"].long().tolist()
    return {name: float(values[name]) for name in METRICS}, tuple(tuple(r) for r in confusion)


def _keep(fitted: Fitted, prepared: Prepared, out: Path, records: list[RunRecord]) -> RunRecord:
    """Plots and, for the best seed so far, the bundle; the record last, as it closes the seed.

    A representation that no bundle can hold costs the bundle, not the seed.
    """
    record, folder = fitted.record, out / f"seed-{fitted.record.seed}"
    for other in records[:1]:
        _check_data(record, other, out)
    plot_curves(fitted.history, record.best_epoch, folder / "curves.png")
    plot_confusion(record.confusion, record.classes, folder / "confusion.png")
    if all(record.val_loss < other.val_loss for other in records):
        try:
            Bundle.build(prepared, fitted.classifier, record).save(out / BUNDLE)
        except ConfigError as error:
            (out / NO_BUNDLE).write_text(f"{error}\n")
    append_record(out / RECORDS, record)
    for used in folder.glob("*.ckpt"):
        used.unlink()
    return record


def _check_same(spec: ExperimentSpec, out: Path, records: list[RunRecord]) -> None:
    """Refuse a folder whose records come from another experiment or other data."""
    file = out / CONFIG
    if not records or not file.is_file():
        return
    held, now = yaml.safe_load(file.read_text()) or {}, _identity(spec)
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


def _identity(spec: ExperimentSpec) -> dict[str, Any]:
    """What makes two specs the same experiment; more seeds are the same one, continued."""
    plain = to_plain(spec)
    return {k: v for k, v in plain.items() if k not in ("out", "seeds", "trainer")}


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


def best_run(groups: dict[str, list[RunRecord]]) -> str:
    """The experiment with the highest mean validation AUROC; test rows have no say.

    AUROC, because accuracy on few validation rows cannot tell experiments apart.
    """
    return max(groups, key=lambda name: np.mean([r.val["auroc"] for r in groups[name]]))
