"""What a study does to the training rows of a recipe: named changes, each at several levels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lora_ws.collection import Split
from lora_ws.errors import ConfigError


class Taught(NamedTuple):
    """What a reader is shown.

    Attributes:
        labels: number of the class of each row; those of test rows are true.
        split: rows of each part; those of test stay.
        leaves: number of the leaf class of each row, where the collection knows it.
    """

    labels: Int[np.ndarray, " rows"]
    split: Split
    leaves: Int[np.ndarray, " rows"] | None = None


@dataclass(frozen=True)
class Training:
    """A kind of change of what a reader is trained on.

    Attributes:
        title: what is done, for people.
        levels: how much of it, the first as little as possible.
        apply: of labels, parts, a level and a generator.
        by_leaf: whether it needs the leaf classes.
    """

    title: str
    levels: tuple[float, ...]
    apply: Callable[[Taught, float, np.random.Generator], Taught]
    by_leaf: bool = False


def mislabel(taught: Taught, share: float, rng: np.random.Generator) -> Taught:
    """Give a share of the training and validation rows another class, each as likely.

    Args:
        taught: labels and parts.
        share: of the rows of each part, rounded down.
        rng: draws them.

    Example:
        >>> rows = Split(np.arange(8), np.arange(8, 10), np.arange(10, 12))
        >>> noisy = mislabel(Taught(np.arange(12) % 3, rows), 0.5, np.random.default_rng(0))
        >>> [int((noisy.labels[part] != part % 3).sum()) for part in rows]
        [4, 1, 0]
    """
    labels, classes = taught.labels.copy(), np.unique(taught.labels)
    for part in (taught.split.train, taught.split.val):
        rows = rng.permutation(part)[: int(share * len(part))]
        for row in rows:
            labels[row] = rng.choice(classes[classes != labels[row]])
    return taught._replace(labels=labels)


def mistake_neighbours(taught: Taught, share: float, rng: np.random.Generator) -> Taught:
    """Give a share of the training and validation rows the class after theirs, as confusion does.

    Example:
        >>> rows = Split(np.arange(8), np.arange(8, 10), np.arange(10, 12))
        >>> told = mistake_neighbours(Taught(np.arange(12) % 3, rows), 1, np.random.default_rng(0))
        >>> told.labels.tolist()
        [1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 1, 2]
    """
    labels, count = taught.labels.copy(), int(taught.labels.max()) + 1
    for part in (taught.split.train, taught.split.val):
        rows = rng.permutation(part)[: int(share * len(part))]
        labels[rows] = (labels[rows] + 1) % count
    return taught._replace(labels=labels)


def mislabel_leaves(taught: Taught, share: float, rng: np.random.Generator) -> Taught:
    """Give all training and validation rows of a share of the leaf classes one other class.

    As when a folder of a kind of things was put in the wrong place: the mistakes agree with each
    other, so a reader can learn them.

    Args:
        taught: labels, parts and leaf classes.
        share: of the leaf classes of these rows, rounded down.
        rng: draws them.

    Example:
        >>> rows = Split(np.arange(8), np.arange(8, 10), np.arange(10, 12))
        >>> one = Taught(np.arange(12) % 2, rows, np.arange(12) % 4)
        >>> mislabel_leaves(one, 0.25, np.random.default_rng(0)).labels.tolist()
        [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1]
    """
    labels, classes = taught.labels.copy(), np.unique(taught.labels)
    known = np.concatenate([taught.split.train, taught.split.val])
    of = _leaves(taught)[known]
    leaves = np.unique(of)
    for leaf in rng.permutation(leaves)[: int(share * len(leaves))]:
        rows = known[of == leaf]
        labels[rows] = rng.choice(classes[classes != labels[rows[0]]])
    return taught._replace(labels=labels)


def _leaves(taught: Taught) -> Int[np.ndarray, " rows"]:
    if taught.leaves is None:
        raise ConfigError(
            "leaf-noise: expected a collection whose card names its leaf classes "
            "(group_columns: {leaf: COLUMN}), got one without"
        )
    return taught.leaves


def unbalance(taught: Taught, ratio: float, rng: np.random.Generator) -> Taught:
    """Leave ``n ratio^(-c / (C - 1))`` training rows of the c-th class, classes in a drawn order.

    At least two are left of each; validation and test rows stay balanced as they are.

    Args:
        taught: labels and parts.
        ratio: of the most frequent class to the rarest.
        rng: draws the order and the rows.

    Example:
        >>> rows = Split(np.arange(60), np.arange(60, 63), np.arange(63, 66))
        >>> left = unbalance(Taught(np.arange(66) % 3, rows), 10, np.random.default_rng(0))
        >>> sorted(np.bincount(left.labels[left.split.train]).tolist())
        [2, 6, 20]
    """
    labels, train = taught.labels, taught.split.train
    classes = rng.permutation(np.unique(labels[train]))
    kept = []
    for place, label in enumerate(classes):
        rows = rng.permutation(train[labels[train] == label])
        wanted = len(rows) * ratio ** (-place / max(len(classes) - 1, 1))
        kept.append(rows[: max(2, round(wanted))])
    return taught._replace(split=taught.split._replace(train=np.sort(np.concatenate(kept))))


def take_few(taught: Taught, shots: float, rng: np.random.Generator) -> Taught:
    """Leave so many training rows of each class; of one draw, fewer are among more.

    Example:
        >>> rows = Split(np.arange(60), np.arange(60, 63), np.arange(63, 66))
        >>> one = Taught(np.arange(66) % 3, rows)
        >>> few, more = (take_few(one, n, np.random.default_rng(0)).split.train for n in (2, 5))
        >>> len(few), len(more), set(few.tolist()) <= set(more.tolist())
        (6, 15, True)
    """
    labels, train = taught.labels, taught.split.train
    kept = [
        rng.permutation(train[labels[train] == label])[: int(shots)]
        for label in np.unique(labels[train])
    ]
    return taught._replace(split=taught.split._replace(train=np.sort(np.concatenate(kept))))


TRAININGS: Mapping[str, Training] = {
    "label-noise": Training(
        "share of training and validation labels of another class", (0.0, 0.1, 0.2, 0.4), mislabel
    ),
    "label-confusion": Training(
        "share of training and validation labels of the next class",
        (0.0, 0.1, 0.2, 0.4),
        mistake_neighbours,
    ),
    "leaf-noise": Training(
        "share of leaf classes of which all training and validation labels are of another class",
        (0.0, 0.1, 0.2, 0.4),
        mislabel_leaves,
        by_leaf=True,
    ),
    "imbalance": Training(
        "times as many rows of the most frequent class as of the rarest",
        (1.0, 10.0, 50.0),
        unbalance,
    ),
    "few-shot": Training("training rows of each class", (2.0, 5.0, 10.0, 20.0, 35.0), take_few),
}
