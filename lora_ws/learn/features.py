"""From a collection to rows that a network can be fitted on, once for all seeds."""

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import TransformerMixin, clone
from sklearn.utils import get_tags

from lora_ws.adapters import Layout
from lora_ws.collection import AdapterSet, Split, load
from lora_ws.errors import ConfigError, DataError, notice
from lora_ws.featurizers import Featurizer
from lora_ws.functional.rows import Rows
from lora_ws.learn.ranks import Ranks
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.learn.tasks import Task
from lora_ws.memory import BLOCK_BYTES, blocks, check_room, held_bytes
from lora_ws.models import InputSpec, MetanetModule, Metanetwork
from lora_ws.models.module import normalizer_for
from lora_ws.models.normalizers import ColumnScaler, Normalizer

WHY = {"train": "train", "val": "validate", "test": "test"}


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a network is trained on: rows, labels, the split, and constants of the training rows.

    Attributes:
        adapters: the adapters of the subset, all parts.
        featurizer: fitted on the training rows.
        features: float32 ``[rows, features]``, a tensor or a mapped array; the weights themselves
            for a network that reads factors.
        labels: target of each row: the number of its class, or a number (float32).
        task: what the labels are, fitted on those of the training rows.
        split: which rows are which part.
        inputs: what the columns of the features are.
        normalizer: fitted on the training rows; every seed's network gets a copy.
        subset: name of the subset, or empty.
        seconds: time to make the features.
    """

    adapters: AdapterSet
    featurizer: Any
    features: torch.Tensor | np.ndarray
    labels: np.ndarray
    task: Task
    split: Split
    inputs: InputSpec
    normalizer: Normalizer
    subset: str
    seconds: float

    def network(self, model: Metanetwork) -> MetanetModule:
        """Build a network for these rows; torch's generator draws its initial weights."""
        network = self.task.build(model, self.inputs)
        network.normalizer.load_state_dict(self.normalizer.state_dict())
        return network

    def columns(self, part: slice, featurizer: Any = None) -> "Prepared":
        """Some of the features alone.

        Args:
            part: which.
            featurizer: that makes these; None where nothing will ask.
        """
        assert isinstance(self.normalizer, ColumnScaler)
        features = self.features[:, part]
        return replace(
            self,
            featurizer=featurizer,
            features=features,
            inputs=InputSpec(features.shape[1]),
            normalizer=self.normalizer.select(part),
        )


def open_data(spec: ExperimentSpec) -> tuple[AdapterSet, str]:
    """The collection of a spec with its split, and the name of the subset taken.

    Rows without a value of the label are left out, with a notice.
    """
    adapters = load(spec.dataset, revision=spec.revision)
    if spec.split is not None:
        adapters = adapters.split_by(spec.split)
    subset = spec.subset or next(iter(adapters.card.subsets), "")
    adapters = adapters.subset(subset) if subset else adapters
    for label in adapters.label_columns(spec.label):
        if label in adapters.rows.column_names and (lost := adapters.rows[label].null_count):
            notice(f"{adapters.card.name}: {lost} rows without a `{label}` are left out")
            adapters = adapters.select(adapters.rows[label].is_valid().to_numpy())
    return adapters, subset


def prepare(spec: ExperimentSpec, data: tuple[AdapterSet, str] | None = None) -> Prepared:
    """Load, split, featurize and normalize, fitting on training rows only.

    Args:
        spec: the experiment.
        data: adapters in memory and the name of their subset, instead of those that it names.

    Raises:
        ConfigError: the spec has no single featurizer, or it does not fit the data.
    """
    spec.check_single()
    adapters, subset = data or open_data(spec)
    labels, classes = spec.kind.read(adapters, spec.label)
    split = split_rows(adapters, spec)
    start = time.perf_counter()
    if not isinstance(spec.model, Metanetwork) and get_tags(spec.model).input_tags.pairwise:
        # A kernel of the training rows.
        _check_room(spec, split, width=len(split.train))
    if spec.featurizer is None:
        featurizer, features = None, table_features(adapters, spec.metadata)
    else:
        featurizer = with_layout(spec.representation, adapters)
        features = represent(featurizer, adapters.weights, split.train, labels[split.train])
    _check_room(spec, split, features.shape[1])
    inputs = input_spec(spec, adapters.layout, features.shape[1])
    make = spec.model.normalizer if isinstance(spec.model, Metanetwork) else normalizer_for
    normalizer = make(inputs).fit(features, split.train)
    seconds = time.perf_counter() - start
    features = _kept(features, adapters.weights)
    task = spec.kind.fit(labels[split.train], classes)
    return Prepared(
        adapters, featurizer, features, labels, task, split, inputs, normalizer, subset, seconds
    )


def _kept(features: np.ndarray, weights: np.ndarray) -> torch.Tensor | np.ndarray:
    """A tensor, but what is large stays where it is: in the store, or in a file of its own."""
    view, most = np.may_share_memory(features, weights), held_bytes()
    if features.nbytes > (min(BLOCK_BYTES, most) if view else most):
        return features
    return torch.from_numpy(features.copy() if view else features)


def _check_room(spec: ExperimentSpec, split: Split, width: int) -> None:
    """Refuse to hold more rows of features than there is room for: scikit-learn wants them all."""
    if isinstance(spec.model, Metanetwork):
        return
    rows = len(split.train) + (len(split.val) if spec.refit else 0)
    check_room(
        f"model: {type(spec.model).__name__}, {rows} training rows of {width} numbers",
        4 * rows * width,
        advice="--first_rows, or a network, which reads blocks",
    )


def refit_features(spec: ExperimentSpec, prepared: Prepared, rows: np.ndarray) -> Prepared:
    """The same data, with everything that learns fitted on other training rows.

    Args:
        spec: the experiment, whose network reads features.
        prepared: its data.
        rows: which rows to fit on; the other parts stay.
    """
    featurizer, features = prepared.featurizer, np.asarray(prepared.features)
    adapters, labels = prepared.adapters, prepared.labels
    if featurizer is not None:
        featurizer = with_layout(spec.representation, adapters)
        features = represent(featurizer, adapters.weights, rows, labels[rows])
    inputs = InputSpec(features.shape[1])
    return replace(
        prepared,
        featurizer=featurizer,
        features=_kept(features, adapters.weights),
        task=spec.kind.fit(labels[rows], prepared.task.classes),
        split=prepared.split._replace(train=rows),
        inputs=inputs,
        normalizer=normalizer_for(inputs).fit(features, rows),
    )


def input_spec(spec: ExperimentSpec, layout: Layout, width: int) -> InputSpec:
    """What the network of a spec knows about its rows.

    Raises:
        LayoutError: it reads factors, and only one of a layer's two matrices is chosen.
    """
    return InputSpec(width, layout.choose(spec.matrices).layout if spec.reads_factors else None)


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


def split_rows(adapters: AdapterSet, spec: ExperimentSpec) -> Split:
    """The rows of each part that an experiment uses.

    Raises:
        DataError: a part is empty, or a class has fewer than 3 adapters or none to train on.
    """
    kind, name = spec.kind, f"`{adapters.card.name}`"
    labels, classes = kind.read(adapters, spec.label)
    kind.check(name, labels, classes, LEAST)
    parts = adapters.split(spec.label if kind.stratifies else None)
    parts = kind.assign(parts, labels, classes)
    split = Split(*(part[: spec.first_rows] for part in parts))
    for part, rows in split._asdict().items():
        if not len(rows):
            raise DataError(
                f"{name}: expected rows to {WHY[part]}, its split gives none; set "
                "split.fractions in the card, or choose another --split"
            )
    kind.check(f"{name}, training rows", labels[split.train], classes, 1)
    return split


def table_features(adapters: AdapterSet, columns: Sequence[str]) -> np.ndarray:
    """Columns of the table as features: numbers as they are, other values as codes.

    Returns:
        float32 ``[rows, columns]``.
    """
    found = []
    for name in columns:
        values = adapters.column(name)
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
        found = np.asarray(prepared.features)
        written = not np.may_share_memory(found, prepared.adapters.weights)
        if written:
            np.save(file, found)
            prepared = replace(prepared, features=np.load(file, mmap_mode="r"))
        own.append(prepared)
        names = {f.name for f in fields(prepared)} - {"adapters", "featurizer", "features"}
        return {"written": written, **{name: getattr(prepared, name) for name in names}}

    told = ranks.first(make)
    return own[0] if own else _receive(spec, file, **told)


def _receive(spec: ExperimentSpec, file: Path, written: bool, **told: Any) -> Prepared:
    """What the first rank prepared, with features from its file or, as there, from the store."""
    adapters, _ = open_data(spec)
    featurizer = with_layout(spec.representation, adapters) if spec.featurizer is not None else None
    if written:
        features = np.load(file, mmap_mode="r")
    else:
        features = represent(featurizer, adapters.weights, told["split"].train)
    return Prepared(adapters=adapters, featurizer=featurizer, features=features, **told)


def with_layout(featurizer: Featurizer | TransformerMixin | None, adapters: AdapterSet) -> Any:
    """An unfitted copy that knows the collection's layout, if it takes one."""
    copy: Any = clone(featurizer)
    if "layout" in copy.get_params() and copy.layout is None:
        copy.set_params(layout=adapters.layout)
    return copy


# Transforms some rows of weights, part by part, by a fitted featurizer.
Transform = Callable[[Any, np.ndarray, Iterable[Any]], Iterable[np.ndarray]]


def transform_here(featurizer: Any, weights: np.ndarray, parts: Iterable[Any]) -> Iterator[Any]:
    """Transform parts of the rows in this process.

    Args:
        featurizer: fitted.
        weights: of all rows.
        parts: what indexes rows.
    """
    return (featurizer.transform(weights[part]) for part in parts)


def represent(
    featurizer: Any,
    weights: np.ndarray,
    train: np.ndarray,
    y: np.ndarray | None = None,
    transform: Transform = transform_here,
) -> np.ndarray:
    """Fit on the training rows and represent all rows, in bounded memory.

    Args:
        featurizer: unfitted; fitted in place.
        weights: of all rows.
        train: which rows to fit on.
        y: labels of these, for transformers that look at them.
        transform: what transforms blocks of rows that are not fitted on.
    """
    if isinstance(featurizer, Featurizer) and not featurizer.learns:
        return _transform(featurizer.fit(weights[:2]), weights, transform)
    mapped = isinstance(weights, np.memmap) and getattr(featurizer, "blockwise", False)
    held = _held(len(train), weights) and not mapped
    rows: Any = weights[train] if held else Rows(weights, train)
    if isinstance(rows, Rows) and not isinstance(featurizer, Featurizer):
        raise ConfigError(
            f"{type(featurizer).__name__}: expected training rows that fit in memory, got "
            f"{4 * rows.shape[0] * rows.shape[1] >> 20} MiB, and a quarter of --memory_limit is "
            f"{held_bytes() >> 20} MiB; raise it, or use FlatVecPCA, say, which reads blocks"
        )
    if hasattr(featurizer, "fit_transform"):
        fitted = np.asarray(featurizer.fit_transform(rows, y), np.float32)
    else:
        fitted = np.asarray(featurizer.fit(rows, y).transform(rows), np.float32)
    features = _empty(len(weights), fitted.shape[1])
    features[train] = fitted
    rest = np.setdiff1d(np.arange(len(weights)), train)
    parts = [rest[block] for block in blocks(len(rest), 4 * weights.shape[1])]
    for part, made in zip(parts, transform(featurizer, weights, parts), strict=True):
        features[part] = made
    return features


def _transform(featurizer: Any, weights: np.ndarray, transform: Transform) -> np.ndarray:
    first = featurizer.transform(weights[:1])
    if first.shape[1] == weights.shape[1] and np.shares_memory(first, weights):
        return featurizer.transform(weights)
    out = _empty(len(weights), first.shape[1])
    parts = list(blocks(len(weights), 4 * weights.shape[1]))
    for part, made in zip(parts, transform(featurizer, weights, parts), strict=True):
        out[part] = made
    return out


def _held(rows: int, weights: np.ndarray) -> bool:
    """Whether so many rows may be copied as a whole."""
    return 4 * rows * weights.shape[1] <= held_bytes()


def _empty(rows: int, columns: int) -> np.ndarray:
    """Room for features: in memory if small, else in a temporary file, mapped."""
    if 4 * rows * columns <= held_bytes():
        return np.empty((rows, columns), np.float32)
    folder = tempfile.mkdtemp(prefix="lora_ws-")
    made = np.memmap(Path(folder, "features"), np.float32, "w+", shape=(rows, columns))
    # Windows deletes no file that is mapped, and whoever has the array may keep it.
    weakref.finalize(made.base, shutil.rmtree, folder, ignore_errors=True)
    return made
