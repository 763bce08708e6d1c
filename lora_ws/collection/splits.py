"""Train, validation and test rows: a pure function of labels, groups and the card's rule."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from sklearn.model_selection import train_test_split

from lora_ws.collection.card import SplitRule
from lora_ws.errors import DataError


class Split(NamedTuple):
    """Row numbers of the three parts, each ascending."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_split(
    labels: Int[np.ndarray, " rows"], groups: np.ndarray | None, rule: SplitRule
) -> Split:
    """Split rows by label, keeping the rows of a group together.

    Args:
        labels: integer class of each row; each part gets the same shares of every class.
        groups: group of each row (any hashable values), or None where each row is its own.
        rule: fractions and seed.

    Raises:
        DataError: the fractions do not fit, a group has two labels, or a class is too small.

    Example:
        >>> labels = np.repeat(np.arange(2), 10)
        >>> [len(part) for part in make_split(labels, None, SplitRule())]
        [14, 2, 4]
    """
    train, val, test = rule.fractions
    if min(train, test) <= 0 or val < 0 or abs(train + val + test - 1) > 1e-9:
        raise DataError(
            f"split.fractions: expected three shares that sum to 1, got {rule.fractions}"
        )
    if not len(labels):
        raise DataError("expected rows to split, got none")
    if groups is None:
        groups = np.arange(len(labels))
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    # Groups in order of first appearance, so that adding a subset changes no other's split.
    order = np.argsort(np.argsort(first))
    member, first = order[member], np.sort(first)
    if not np.array_equal(labels, labels[first][member]):
        row = int(np.flatnonzero(labels != labels[first][member])[0])
        raise DataError(f"row {row}: its group `{groups[row]}` holds rows of two labels")
    parts = _split_groups(labels[first], (train, val, test), rule.seed)
    return Split(*(np.flatnonzero(np.isin(member, part)) for part in parts))


def _split_groups(
    labels: np.ndarray, fractions: tuple[float, float, float], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _, val, test = fractions
    everything = np.arange(len(labels))
    # Counts, because sums of decimal fractions round up to one row too many.
    n_val, n_test = round(val * len(labels)), round(test * len(labels))
    try:
        kept, rest = map(
            np.asarray,
            train_test_split(
                everything, test_size=n_val + n_test, stratify=labels, random_state=seed
            ),
        )
        if val == 0:
            return kept, rest[:0], rest
        held, tested = map(
            np.asarray,
            train_test_split(rest, test_size=n_test, stratify=labels[rest], random_state=seed),
        )
    except ValueError as error:
        counts = np.bincount(labels)
        raise DataError(
            f"cannot split {len(labels)} rows or groups into parts of {fractions} that hold every "
            f"class (smallest class: {counts[counts > 0].min()}): {error}"
        ) from error
    return kept, held, tested
