"""The folder of a run: what lies in it, whose it is, and how finished seeds get there.

``config.yaml``, ``versions.json``, ``records.jsonl`` and ``curves.jsonl`` (one line per seed),
``seed-<k>/`` with logs, plots of all seeds, and ``bundle/``, the network of the seed with the
lowest validation loss.
"""

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from lora_ws import journal
from lora_ws.bundle.confidence import Confidence
from lora_ws.config import dump_yaml, to_plain
from lora_ws.errors import ConfigError, DataError
from lora_ws.functional.calibrate import Reliability
from lora_ws.learn.calibration import Reliabilities, fit_confidence
from lora_ws.learn.features import open_data
from lora_ws.learn.pack import pack
from lora_ws.learn.result import Fitted
from lora_ws.learn.spec import ExperimentSpec, identity, read_identity, slug
from lora_ws.report.plots import plot_confusion, plot_curves, plot_reliability
from lora_ws.report.records import RunRecord, read_records

RECORDS, CONFIG, VERSIONS, BUNDLE = "records.jsonl", "config.yaml", "versions.json", "bundle"
CURVES, PLOTS = "curves.jsonl", ("curves.png", "confusion.png", "reliability.png")
# Letters of a folder's name that say what is different in it.
MAX_NAME = 100
LOCK, NO_BUNDLE, FEATURES, STATE = ".lock", "no_bundle.txt", ".features.npy", ".state"


class RunWriter(NamedTuple):
    """Puts finished seeds into the folder of a run.

    Attributes:
        out: the folder.
        full: also plots and the bundle.
    """

    out: Path
    full: bool

    def seed(self, fitted: Fitted, records: list[RunRecord]) -> RunRecord:
        """The bundle and curves; the record last, as it closes the seed."""
        return self.keep(self.finish(fitted, records), records)

    def finish(self, fitted: Fitted, records: list[RunRecord]) -> "Finished":
        """What will be kept of a seed, which any process may make.

        Args:
            fitted: the seed.
            records: some that the folder holds already; where one of these is better, there is no
                bundle.
        """
        record, found, bundle, why = fitted.record, None, None, ""
        if self.full:
            if fitted.job.prepared.task.gives_probabilities:
                held = fitted.out_of_fold
                found = fit_confidence(fitted.job.prepared, fitted.network, held)
            if _is_best(record, records):
                # Of its own name: a process that outlives its command may be at the same seed.
                bundle = self._of(record) / f"{BUNDLE}-{uuid4().hex}"
                why = _pack(fitted, bundle, found and found.confidence)
        return Finished(record, _curves(fitted, found), bundle, why)

    def keep(self, finished: "Finished", records: list[RunRecord]) -> RunRecord:
        """Put a finished seed where it is looked for; the process that claimed the folder does.

        Args:
            finished: the seed.
            records: all that the folder holds.
        """
        record, folder = finished.record, self._of(finished.record)
        for other in records[:1]:
            _check_data(record, other, self.out)
        if finished.bundle and _is_best(record, records):
            self._take(finished.bundle, finished.why)
        journal.append(self.out / CURVES, [finished.curves])
        journal.append(self.out / RECORDS, [record.to_dict()])
        for used in folder.glob("*.ckpt"):
            used.unlink()
        for unused in folder.glob(f"{BUNDLE}-*"):
            shutil.rmtree(unused, ignore_errors=True)
        return record

    def draw(self, records: Sequence[RunRecord], *, again: bool = True) -> None:
        """Plots of all seeds: drawing them one by one would cost as much as training them.

        Args:
            records: of the folder.
            again: also where there are plots.
        """
        if not self.full or (not again and (self.out / PLOTS[0]).is_file()):
            return
        held = {line["seed"]: line for line in journal.read(self.out / CURVES)}
        drawn = [record for record in records if record.seed in held]
        if not drawn:
            return
        first, n = records[0], len(drawn)
        rows = f"{first.n_train} rows to train, {first.n_val} to validate"
        plot_curves(
            [held[record.seed]["curves"] for record in drawn],
            [record.best_epoch for record in drawn],
            self.out / PLOTS[0],
            title=f"{first.name}, {n} seeds; {rows}",
        )
        if first.confusion:
            together = np.sum([record.confusion for record in drawn], axis=0).tolist()
            plot_confusion(together, first.classes, self.out / PLOTS[1], seeds=n)
        # Seeds share their test rows: those of all would only look like more.
        kept = held[min(drawn, key=lambda record: record.val_loss).seed]
        if tables := kept.get("reliability"):
            plot_reliability({k: _table(one) for k, one in tables.items()}, self.out / PLOTS[2])

    def _of(self, record: RunRecord) -> Path:
        return self.out / f"seed-{record.seed}"

    def _take(self, bundle: Path, why: str) -> None:
        """A network or representation that no bundle can hold costs the bundle, not the seed."""
        if why:
            (self.out / NO_BUNDLE).write_text(f"{why}\n", encoding="utf-8")
            return
        shutil.rmtree(self.out / BUNDLE, ignore_errors=True)
        bundle.rename(self.out / BUNDLE)
        (self.out / NO_BUNDLE).unlink(missing_ok=True)


class Finished(NamedTuple):
    """A seed as a folder keeps it.

    Attributes:
        record: its numbers.
        curves: what charts of it need.
        bundle: folder where it lies until it is known to be the best; None where it is not.
        why: there is no bundle though it may be the best; empty otherwise.
    """

    record: RunRecord
    curves: dict[str, Any]
    bundle: Path | None
    why: str


def _is_best(record: RunRecord, records: Sequence[RunRecord]) -> bool:
    return all(record.val_loss < other.val_loss for other in records)


def _pack(fitted: Fitted, folder: Path, confidence: Confidence | None) -> str:
    """Write the bundle, or say why none can be."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        pack(fitted, folder, confidence)
    except ConfigError as error:
        return str(error)
    return ""


def _curves(fitted: Fitted, found: Reliabilities | None) -> dict[str, Any]:
    """What charts of a seed need: history, reliability, and of two classes the scores of ROC."""
    line: dict[str, Any] = {"seed": fitted.record.seed, "curves": fitted.history}
    if found is not None:
        tables = {"softmax": found.before, "calibrated": found.after}
        line["reliability"] = {
            name: {key: np.nan_to_num(value).tolist() for key, value in table._asdict().items()}
            for name, table in tables.items()
        }
    if len(fitted.record.confusion) == 2:
        line["scores"] = fitted.test.scores[:, 1].tolist()
        line["truth"] = fitted.test.truth.tolist()
    return line


def _table(plain: dict[str, Any]) -> Reliability:
    bins = {key: np.asarray(value) for key, value in plain.items() if key != "error"}
    return Reliability(plain["error"], **bins)


def enter(spec: ExperimentSpec, out: Path, held: ExitStack) -> list[RunRecord]:
    """Claim the folder until ``held`` closes, and read what it has."""
    out.mkdir(parents=True, exist_ok=True)
    busy = f"{out} is being run by another process; choose another --out"
    try:
        held.enter_context(journal.locked(out / LOCK, busy))
    except DataError as error:
        raise ConfigError(str(error)) from error
    held.callback((out / FEATURES).unlink, missing_ok=True)
    records = read_records(out / RECORDS)
    check_same(spec, out, records)
    return records


def folder_for(spec: ExperimentSpec, home: Path) -> Path:
    """Choose the folder of an experiment: its home, unless that holds one with other settings.

    Equal settings give the same folder again, so a run that was cut off continues.

    Args:
        spec: the experiment.
        home: where it goes if nothing else is there.

    Returns:
        ``home``, or a folder beside it whose name ends in the settings that differ:
        ``StatsLayer-fit.lr=0.01``.
    """
    if not (home / CONFIG).is_file() or not read_records(home / RECORDS):
        return home
    return folder_beside(home, changed_settings(spec, home / CONFIG))


def changed_settings(spec: ExperimentSpec, file: Path) -> dict[str, Any]:
    """Compare an experiment with that of a run: dotted flags whose values differ, as they are now.

    Args:
        spec: the experiment.
        file: ``config.yaml`` of the run.
    """
    now = identity(spec)
    held, wanted = _leaves(read_identity(file, now)), _leaves(now)
    return {key: value for key, value in wanted.items() if held.get(key) != value}


def folder_beside(home: Path, changed: Mapping[str, Any]) -> Path:
    """Name a folder beside ``home`` by the settings that differ; ``home`` itself without any."""
    if not changed:
        return home
    said = slug(",".join(f"{key}={value}" for key, value in changed.items()))
    if len(said) > MAX_NAME:
        said = f"{said[:MAX_NAME]}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    return home.with_name(f"{home.name}-{said}")


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Plain data as dotted flags and their values: ``fit.lr``, ``model.hidden``."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    found = dict[str, Any]()
    for name, item in value.items():
        hidden = name in ("class_path", "init_args")
        found |= _leaves(item, key if hidden else f"{key}.{name}".lstrip("."))
    return found


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
    names = ["layout", "classes", "n_train", "n_val", "n_test", "engine", "split"]
    # Each seed that chooses what to read may choose as many numbers as it likes.
    names += [] if record.chosen else ["dim"]
    for name in names:
        if getattr(record, name) != getattr(other, name):
            raise ConfigError(
                f"{out} holds seeds with another {name} ({getattr(other, name)}, now "
                f"{getattr(record, name)}); choose another --out"
            )


def describe_run(spec: ExperimentSpec, out: Path, records: list[RunRecord]) -> None:
    """Write the resolved spec and, at the first seed, the versions of what makes the records."""
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
