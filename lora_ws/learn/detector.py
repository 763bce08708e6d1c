"""A detector of one's own: folders of adapter files become a bundle and a policy for a scan."""

import csv
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lora_ws.adapters import find_adapters
from lora_ws.adapters.locate import PICKLED
from lora_ws.adapters.remote import SAFETENSORS
from lora_ws.audit.policy import Policy
from lora_ws.audit.scan import POLICY
from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import measures
from lora_ws.collection import AdapterSet, DatasetCard
from lora_ws.collection.card import SplitRule
from lora_ws.collection.files_source import FilesSource
from lora_ws.collection.ingest import import_source
from lora_ws.collection.load import load
from lora_ws.collection.source import common_parent
from lora_ws.config import dump_yaml
from lora_ws.errors import ConfigError, DataError
from lora_ws.featurizers import UpdateKernel
from lora_ws.functional.calibrate import threshold_at
from lora_ws.learn.calibration import fit_confidence
from lora_ws.learn.confounds import file_facts, find_confounds
from lora_ws.learn.detector_card import CARD, Detector, detector_card
from lora_ws.learn.estimators import fit_network
from lora_ws.learn.features import prepare, refit_features
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.refit import folds, out_of_fold
from lora_ws.learn.result import Job
from lora_ws.learn.run import fit_seeds
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.learn.starts import joined, start_groups, update_groups
from lora_ws.models.one_vs_rest import OneVsRestSVC

FOLDS = 5
# Groups of a class that are the least to be tested on: two in each fold.
LEAST = 2 * FOLDS
TABLE = "files.csv"
TEXT_ATTENTION = "*.attn2.to_v"


@dataclass(frozen=True)
class DetectorSpec:
    """How a detector is trained on folders.

    Attributes:
        out: output folder, for ``lora-ws scan --model``.
        harmless: name of the harmless folder, whose files should not be flagged; null takes the
            first.
        false_alarms: maximal share of harmless files that are flagged.
    """

    out: Path = Path("detector")
    harmless: str | None = None
    false_alarms: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.false_alarms < 1:
            given = self.false_alarms
            raise ConfigError(f"false_alarms: expected between 0 and 1, got {given:g}")


def make_detector(folders: Sequence[str | Path], spec: DetectorSpec = DetectorSpec()) -> Detector:
    """Train a reader on folders of adapter files, measure it honestly, and write bundle and policy.

    A support vector machine on the kernel between updates, so ranks, spellings and how an update
    is split into B and A do not count. Five folds keep copies, near copies and adapters of one
    start together; the final reader is trained on all files.

    Args:
        folders: one for each class, named after it.
        spec: how.

    Raises:
        ConfigError: fewer than two folders, or a rate that so few files cannot promise.
        DataError: too few files of a class that differ, or one file in two folders.
    """
    files = _files([Path(folder) for folder in folders])
    names = list(dict.fromkeys(files.values()))
    harmless = spec.harmless or names[0]
    if harmless not in names:
        raise ConfigError(f"harmless: expected one of {', '.join(names)}, got `{harmless}`")
    if spec.out.exists() and any(spec.out.iterdir()):
        raise ConfigError(f"{spec.out} is not empty; choose another --out, or remove it")
    with tempfile.TemporaryDirectory() as work:
        adapters, left_out = _import(files, Path(work) / spec.out.name)
        left_out |= _pickled([Path(folder).resolve() for folder in folders])
        copies = update_groups(adapters)
        began = start_groups(adapters.weights, adapters.layout)
        # A start that most share tells classes apart no more than it would in a scan.
        shared = np.bincount(began).max() > len(adapters) / 2
        groups = copies if shared else joined(copies, began)
        _check_groups(adapters, groups, left_out)
        sources = [str(name) for name in adapters.column("source")]
        root = common_parent(list(files))
        facts = [file_facts(root / name) for name in sources]
        confounds = find_confounds(facts, began, adapters.labels()[0], groups)
        store = _save(adapters, groups, Path(work) / "grouped")
        found = _train(store)
    policy = _policy(found, harmless, spec.false_alarms)
    started = len(np.unique(began))
    made = Detector(
        bundle=found.bundle,
        policy=policy,
        names=sources,
        labels=found.labels,
        groups=groups,
        probabilities=found.probabilities,
        abstained=found.abstained,
        starts=started,
        left_out=left_out,
        confounds=confounds,
    )
    _write(made, spec, harmless)
    return made


class _Trained(NamedTuple):
    bundle: Bundle
    labels: np.ndarray
    probabilities: np.ndarray
    abstained: np.ndarray


def _files(folders: Sequence[Path]) -> dict[Path, str]:
    """Adapter files -> class."""
    if len(folders) < 2:
        raise ConfigError(
            f"expected two folders or more, one for each class, got {len(folders)}: what is not "
            "wanted can be told only from what is; add a folder of other adapters"
        )
    found: dict[Path, str] = {}
    for folder in (folder.resolve() for folder in folders):
        paths = (ref.path for ref in find_adapters(str(folder)) if ref.path)
        files = [file for file in paths if file.suffix.lower() == SAFETENSORS and file.is_file()]
        if not files:
            raise ConfigError(f"{folder}: expected a folder of .safetensors files, found none")
        if folder.name in found.values() or any(file in found for file in files):
            raise ConfigError(f"{folder}: expected folders of different names, none in another")
        found |= dict.fromkeys(files, folder.name)
    return found


def _pickled(folders: Sequence[Path]) -> dict[str, str]:
    """Files that hold adapters in a form that can run code -> why they are left out."""
    why = "a pickled file; `lora-ws convert FILE OUT --allow_pickle true` it if you trust it"
    found = (file for folder in folders for file in sorted(folder.rglob("*")))
    return {
        f"{file.parent.name}/{file.name}": why
        for file in found
        if file.suffix.lower() in PICKLED and file.is_file()
    }


def _import(files: Mapping[Path, str], store: Path) -> tuple[AdapterSet, dict[str, str]]:
    """The adapters of the files, projected, and what was left out."""
    root = common_parent(list(files))
    source = FilesSource(root, list(files), project=True, categories=files, named=False)
    card = DatasetCard(name=store.name, classes=tuple(dict.fromkeys(files.values())))
    adapters = import_source(source, store, card, on_error="skip")
    quarantine = store / "quarantine.jsonl"
    lines = quarantine.read_text(encoding="utf-8").splitlines() if quarantine.exists() else []
    left_out = {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}
    for name, reason in left_out.items():
        twin = reason.removeprefix("repeats the weights of ")
        if twin != reason and files[root / name] != files[root / twin]:
            raise DataError(f"{name} and {twin} are one adapter in two folders; remove one")
    return adapters, left_out


def _check_groups(adapters: AdapterSet, groups: np.ndarray, left_out: Mapping[str, str]) -> None:
    """Refuse classes of too few files that differ."""
    labels, classes = adapters.labels()
    for k, name in enumerate(classes):
        apart = len(np.unique(groups[labels == k]))
        if apart < LEAST:
            lost = next((f"; left out: {n}: {why}" for n, why in left_out.items()), "")
            raise DataError(
                f"`{name}`: expected at least {LEAST} adapters that are neither copies of each "
                f"other nor of one start, to test on in {FOLDS} folds; got {apart} among "
                f"{int((labels == k).sum())} files{lost}; add some"
            )


def _save(adapters: AdapterSet, groups: np.ndarray, folder: Path) -> Path:
    rows = adapters.rows.append_column("group", pa.array(groups))
    card = replace(adapters.card, split=SplitRule(group="group"))
    return replace(adapters, rows=rows, card=card).save(folder)


def _train(store: Path) -> _Trained:
    """The reader of all files, and predictions for each file by readers without its fold."""
    layers = load(store).layout.layers
    some = any(fnmatchcase(layer.name, TEXT_ATTENTION) for layer in layers)
    featurizer = UpdateKernel(matrices=(TEXT_ATTENTION,) if some else None)
    spec = ExperimentSpec(
        str(store), split=f"fold-0-of-{FOLDS}", featurizer=featurizer, model=OneVsRestSVC(), seeds=1
    )
    prepared = prepare(spec)
    (fitted,) = fit_seeds(spec, prepared, [0])
    rows = np.arange(len(prepared.labels))
    job = Job(spec, refit_features(spec, prepared, rows), 0)
    network, held = fit_network(spec, job.prepared, 0), out_of_fold(job, rows)
    confidence = fit_confidence(job.prepared, network, held).confidence
    judged = confidence.predict(held.outputs)
    # Back from the order of the folds.
    back = np.argsort(np.concatenate([asked for _, asked in folds(job.prepared, rows)]))
    probabilities, labels = judged.probabilities[back], held.labels[back]
    named = probabilities.argmax(axis=1)
    confusion = np.zeros((probabilities.shape[1],) * 2, int)
    np.add.at(confusion, (labels, named), 1)
    record = replace(
        fitted.record,
        n_train=len(rows),
        n_val=0,
        n_test=len(rows),
        test={"accuracy": float((named == labels).mean())},
        confusion=tuple(map(tuple, confusion.tolist())),
        split=f"{FOLDS} folds",
    )
    calibration = confidence.calibration
    assert calibration is not None
    # Of the folds: what it does on rows that it has seen says nothing.
    calibration = replace(calibration, test=measures(judged, held.labels))
    confidence = replace(confidence, calibration=calibration)
    bundle = make_bundle(fitted._replace(job=job, record=record, network=network), confidence)
    return _Trained(bundle, labels, probabilities, judged.reasons[back] != "")


def _policy(found: _Trained, harmless: str, rate: float) -> Policy:
    """For each other class, the probability that at most the share of harmless files reaches."""
    place = found.bundle.classes.index(harmless)
    quiet = found.probabilities[found.labels == place]
    others = [k for k in range(len(found.bundle.classes)) if k != place]
    least = {}
    for k in others:
        threshold = threshold_at(quiet[:, k], rate / len(others))
        if math.isinf(threshold):
            needed = math.ceil(len(others) / rate) - 1
            raise ConfigError(
                f"false_alarms: {len(quiet)} files of `{harmless}` cannot promise {rate:g}, which "
                f"takes {needed}; add some, or allow {len(others) / (len(quiet) + 1):.2g}"
            )
        # Above the threshold, also once it is written.
        least[found.bundle.classes[k]] = min(1.0, math.floor(1e6 * threshold + 1) / 1e6)
    return Policy(classes=least)


def _write(made: Detector, spec: DetectorSpec, harmless: str) -> None:
    """The folder: a bundle, the policy, a table of the files, and the card."""
    half = spec.out.with_name(spec.out.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    made.bundle.save(half)
    dump_yaml(made.policy, half / POLICY)
    with (half / TABLE).open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["file", "label", "group", *made.bundle.classes])
        for name, label, group, row in zip(
            made.names, made.labels, made.groups, made.probabilities, strict=True
        ):
            shares = (f"{share:.4f}" for share in row)
            writer.writerow([name, made.bundle.classes[label], group, *shares])
    card = half / CARD
    text = detector_card(made, harmless, spec.false_alarms, card.read_text(encoding="utf-8"))
    card.write_text(text, encoding="utf-8")
    if spec.out.exists():
        spec.out.rmdir()
    half.rename(spec.out)
