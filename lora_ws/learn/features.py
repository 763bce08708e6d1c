"""From a collection to features that a classifier can be fitted on, once for all seeds."""

import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import TransformerMixin, clone

from lora_ws.collection import AdapterSet, Split, load
from lora_ws.errors import ConfigError, DataError
from lora_ws.featurizers import Featurizer
from lora_ws.functional.standardize import column_moments, safe_scale
from lora_ws.learn.ranks import Ranks
from lora_ws.learn.spec import ExperimentSpec

# Features up to this size are held in memory as one tensor; larger ones stay mapped.
IN_MEMORY_BYTES = 1 << 30
BLOCK_BYTES = 256 << 20
WHY = {"train": "train", "val": "validate", "test": "test"}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A featurized collection with its labels, split and training scaler.

    Attributes:
        zoo: the adapters.
        featurizer: fitted on the training rows.
        features: float32 ``[rows, features]``, a tensor or a mapped array.
        labels: integer class of each row, or its number (float32) in a regression.
        classes: class names; none in a regression.
        split: which rows are which part.
        mean: of each feature over the training rows.
        scale: standard deviation of each feature over the training rows, 1 where it is 0.
        subset: name of the subset, or empty.
        seconds: time to make the features.
    """

    zoo: AdapterSet
    featurizer: Any
    features: torch.Tensor | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    split: Split
    mean: np.ndarray
    scale: np.ndarray
    subset: str
    seconds: float

    @property
    def outputs(self) -> int:
        """How many a network has: one a class, or the number."""
        return len(self.classes) or 1


def open_data(spec: ExperimentSpec) -> tuple[AdapterSet, str]:
    """The collection of a spec with its split, and the name of the subset taken."""
    zoo = load(spec.dataset, revision=spec.revision)
    if spec.split is not None:
        zoo = zoo.split_by(spec.split)
    subset = spec.subset or next(iter(zoo.card.subsets), "")
    return (zoo.subset(subset) if subset else zoo), subset


def prepare(spec: ExperimentSpec) -> Prepared:
    """Load, split, featurize (fitting on training rows only) and fit the scaler.

    Raises:
        ConfigError: the spec has no single featurizer, or it does not fit the data.
    """
    if spec.featurizer is None and not spec.metadata:
        raise ConfigError("featurizer: expected one representation, got none; use spec.rows()")
    zoo, subset = open_data(spec)
    labels, classes = (zoo.numbers(spec.label), ()) if spec.regression else zoo.labels(spec.label)
    split = split_rows(zoo, spec)
    start = time.perf_counter()
    if spec.featurizer is None:
        featurizer, features = None, table_features(zoo, spec.metadata)
    else:
        featurizer = with_layout(spec.featurizer, zoo)
        features = represent(featurizer, zoo.weights, split.train, labels[split.train])
    mean, std = column_moments(features, rows=split.train)
    seconds = time.perf_counter() - start
    # A view of a large store stays where it is: on disk.
    view = np.may_share_memory(features, zoo.weights)
    if not view or features.nbytes <= IN_MEMORY_BYTES:
        features = torch.from_numpy(features.copy() if view else features)
    return Prepared(
        zoo,
        featurizer,
        features,
        labels,
        classes,
        split,
        mean.astype(np.float32),
        safe_scale(std.astype(np.float32)),
        subset,
        seconds,
    )


def for_seed(spec: ExperimentSpec, prepared: Prepared, seed: int) -> Prepared:
    """The data as a seed sees them: with labels shuffled within each part where the spec says so.

    Across parts, a class rarer in training would be more frequent in the test, and guessing by
    frequency would score below chance.
    """
    if not spec.shuffle_labels:
        return prepared
    rng, labels = np.random.default_rng(seed), prepared.labels.copy()
    for part in prepared.split:
        labels[part] = rng.permutation(prepared.labels[part])
    return replace(prepared, labels=labels)


# Adapters of a class: one to train, to validate and to test.
LEAST = 3


def split_rows(zoo: AdapterSet, spec: ExperimentSpec) -> Split:
    """The rows of each part that an experiment uses.

    Raises:
        DataError: a part is empty, or a class has fewer than 3 adapters or none to train on.
    """
    # Numbers differ from row to row, so it is the card's classes that the parts share alike.
    label = None if spec.regression else spec.label
    if not spec.regression:
        _check_classes(zoo, spec, np.arange(len(zoo)), LEAST)
    split = Split(*(part[: spec.first_rows] for part in zoo.split(label)))
    for name, part in split._asdict().items():
        if not len(part):
            raise DataError(
                f"`{zoo.card.name}`: expected rows to {WHY[name]}, its split gives none; set "
                "split.fractions in the card, or choose another --split"
            )
    if not spec.regression:
        _check_classes(zoo, spec, split.train, 1)
    return split


def _check_classes(zoo: AdapterSet, spec: ExperimentSpec, rows: np.ndarray, least: int) -> None:
    labels, names = zoo.labels(spec.label)
    counts = np.bincount(labels[rows], minlength=len(names))
    if counts.min() < least:
        where = "" if len(rows) == len(zoo) else " to train on"
        raise DataError(
            f"`{zoo.card.name}`: expected at least {least} adapters of each class{where}, got "
            f"{counts.min()} of `{names[counts.argmin()]}`; add some or leave the class out"
        )


def table_features(zoo: AdapterSet, columns: Sequence[str]) -> np.ndarray:
    """Columns of the table as features: numbers as they are, other values as codes.

    Returns:
        float32 ``[rows, columns]``.
    """
    found = []
    for name in columns:
        values = zoo.column(name)
        if not np.issubdtype(values.dtype, np.number):
            values = np.unique(values.astype(str), return_inverse=True)[1]
        found.append(values.astype(np.float32))
    return np.stack(found, axis=1)


def prepare_once(spec: ExperimentSpec, ranks: Ranks, file: Path) -> Prepared:
    """`prepare` on the first rank alone: the others map what it wrote, so features are equal.

    Args:
        spec: an experiment with one representation.
        ranks: who takes part.
        file: where the features go, unless they are the store's own numbers.
    """
    if ranks.world == 1:
        return prepare(spec)
    own: list[Prepared] = []

    def make() -> dict[str, Any]:
        prepared = prepare(spec)
        written = isinstance(prepared.features, torch.Tensor)
        if written:
            np.save(file, np.asarray(prepared.features))
            prepared = replace(prepared, features=np.load(file, mmap_mode="r"))
        own.append(prepared)
        names = {f.name for f in fields(prepared)} - {"zoo", "featurizer", "features"}
        return {"written": written, **{name: getattr(prepared, name) for name in names}}

    told = ranks.first(make)
    return own[0] if own else _receive(spec, file, **told)


def _receive(spec: ExperimentSpec, file: Path, written: bool, **told: Any) -> Prepared:
    """What the first rank prepared, with features from its file or, as there, from the store."""
    zoo, _ = open_data(spec)
    featurizer = with_layout(spec.featurizer, zoo) if spec.featurizer is not None else None
    if written:
        features = np.load(file, mmap_mode="r")
    else:
        features = represent(featurizer, zoo.weights, told["split"].train)
    return Prepared(zoo=zoo, featurizer=featurizer, features=features, **told)


def with_layout(featurizer: TransformerMixin, zoo: AdapterSet) -> Any:
    """An unfitted copy that knows the collection's layout, if it takes one."""
    copy: Any = clone(featurizer)
    if "layout" in copy.get_params() and copy.layout is None:
        copy.set_params(layout=zoo.layout)
    return copy


def represent(
    featurizer: Any, weights: np.ndarray, train: np.ndarray, y: np.ndarray | None = None
) -> np.ndarray:
    """Fit on the training rows and represent all rows, in bounded memory.

    Args:
        featurizer: unfitted; fitted in place.
        weights: of all rows.
        train: which rows to fit on.
        y: labels of these, for transformers that look at them.
    """
    if isinstance(featurizer, Featurizer) and not featurizer.learns:
        return _transform(featurizer.fit(weights[:2]), weights)
    rows = _rows(weights, train)
    if hasattr(featurizer, "fit_transform"):
        fitted = np.asarray(featurizer.fit_transform(rows, y), np.float32)
    else:
        fitted = np.asarray(featurizer.fit(rows, y).transform(rows), np.float32)
    features = np.empty((len(weights), fitted.shape[1]), np.float32)
    features[train] = fitted
    rest = np.setdiff1d(np.arange(len(weights)), train)
    for block in _blocks(len(rest), weights.shape[1]):
        features[rest[block]] = featurizer.transform(weights[rest[block]])
    return features


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Consecutive rows whose numbers take a bounded share of memory."""
    step = max(1, BLOCK_BYTES // (4 * width))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _transform(featurizer: Any, weights: np.ndarray) -> np.ndarray:
    first = featurizer.transform(weights[:1])
    if first.shape[1] == weights.shape[1] and np.shares_memory(first, weights):
        return featurizer.transform(weights)
    out = np.empty((len(weights), first.shape[1]), np.float32)
    for block in _blocks(*weights.shape):
        out[block] = featurizer.transform(weights[block])
    return out


def _rows(weights: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The rows at ``index``: a copy in memory if small, else in a temporary file, mapped."""
    if 4 * len(index) * weights.shape[1] <= IN_MEMORY_BYTES:
        return weights[index]
    folder, shape = tempfile.mkdtemp(prefix="lora_ws-"), (len(index), weights.shape[1])
    copy = np.memmap(Path(folder, "rows"), np.float32, "w+", shape=shape)
    # Windows deletes no file that is mapped, and a transformer may keep the array.
    weakref.finalize(copy.base, shutil.rmtree, folder, ignore_errors=True)
    for block in _blocks(*shape):
        copy[block] = weights[index[block]]
    return copy
