"""Train, validation and test rows: a pure function of labels, groups and the card's rule."""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lora_ws.collection.card import SplitRule
from lora_ws.errors import DataError


class Split(NamedTuple):
    """Row numbers of the three parts, each ascending.

    Example:
        >>> Split(np.arange(7), np.arange(7, 8), np.arange(8, 10)).test.tolist()
        [8, 9]
    """

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


RULES = "fold-0-of-5, group:leaf, published-70-10-20, published-80-20"
_GROUP = "group:"
_FOLD = re.compile(r"fold-(\d+)-of-(\d+)")
# Of the published scripts.
_SEED = 42


def is_rule(name: str) -> bool:
    """Whether a split is named by a rule, not by a column."""
    return re.match(r"(fold-|published-|group:)", name) is not None


def group_of(name: str | None) -> str | None:
    """What a rule like ``group:leaf`` keeps in one part; None for other rules and columns.

    Example:
        >>> group_of("group:leaf"), group_of("part")
        ('leaf', None)
    """
    return name.removeprefix(_GROUP) if name and name.startswith(_GROUP) else None


def split_by_name(name: str, labels: Int[np.ndarray, " rows"], groups: np.ndarray | None) -> Split:
    """Split rows by a rule that has a name.

    ``fold-k-of-n`` tests on the k-th of n stratified folds, validates on the fold after it and
    trains on the others, groups kept together. ``published-…`` are the splits of the authors'
    scripts, by rows alone: ``70-10-20`` takes 30 % off and 67 % of these to test; ``80-20`` tests
    on 20 % and *validates on the same rows*.

    Raises:
        DataError: there is no such rule, or the classes are too small for it.

    Example:
        >>> [len(part) for part in split_by_name("published-80-20", np.arange(10) % 2, None)]
        [8, 2, 2]
    """
    # Here, because it is slow to import, and of those who read a collection few split it.
    from sklearn.model_selection import StratifiedGroupKFold, train_test_split

    rows = np.arange(len(labels))
    if name == "published-80-20":
        train, test = train_test_split(rows, test_size=0.2, random_state=_SEED)
        return Split(np.sort(train), np.sort(test), np.sort(test))
    if name == "published-70-10-20":
        train, rest = train_test_split(rows, test_size=0.3, random_state=_SEED)
        val, test = train_test_split(rest, test_size=0.67, random_state=_SEED)
        return Split(np.sort(train), np.sort(val), np.sort(test))
    match = _FOLD.fullmatch(name)
    if not match or not int(match[1]) < int(match[2]) or int(match[2]) < 3:
        raise DataError(f"split: no rule `{name}`; expected a column or a rule like {RULES}")
    k, n = int(match[1]), int(match[2])
    if np.bincount(labels).max() < n:
        raise DataError(f"split: `{name}` needs at least {n} rows of a class")
    folds = StratifiedGroupKFold(n, shuffle=True, random_state=_SEED)
    parts = [part for _, part in folds.split(rows, labels, rows if groups is None else groups)]
    test, val = parts[k], parts[(k + 1) % n]
    return Split(np.setdiff1d(rows, np.r_[test, val]), np.sort(val), np.sort(test))


def split_by_group(labels: Int[np.ndarray, " rows"], groups: np.ndarray, rule: SplitRule) -> Split:
    """Deal the groups of each class to the parts, at least one to training and one to test.

    A class of two groups has none left to validate on: there validation takes rows of its training
    group, so that the test stays on groups that nothing was fitted or chosen on.

    Raises:
        DataError: a class has one group only, or a group has two labels.

    Example:
        >>> labels, leaves = np.repeat([0, 1], 30), np.repeat(np.arange(6), 10)
        >>> split = split_by_group(labels, leaves, SplitRule())
        >>> [np.unique(leaves[part]).tolist() for part in split]
        [[2, 3], [1, 5], [0, 4]]
    """
    rng = np.random.default_rng(rule.seed)
    _, val, test = rule.fractions
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        mixed = np.isin(groups, groups[rows]) & (labels != label)
        if mixed.any():
            name = groups[np.flatnonzero(mixed)[0]]
            raise DataError(f"split: group `{name}` holds rows of two labels")
        names = rng.permutation(np.unique(groups[rows]))
        if len(names) < 2:
            raise DataError(
                f"split: expected at least two groups of every class, got one of class {label} "
                f"(`{names[0]}`); leave that class out, or split by another rule"
            )
        tested = max(1, round(test * len(names)))
        checked = max(1, round(val * len(names))) if val and len(names) > 2 else 0
        dealt = np.split(names, [len(names) - tested - checked, len(names) - tested])
        train, held, out = (rows[np.isin(groups[rows], part)] for part in dealt)
        if val and not checked:
            train, held = np.split(rng.permutation(train), [-max(1, round(val * len(rows)))])
        for part, own in zip(parts, (train, held, out), strict=True):
            part.append(own)
    return Split(*(np.sort(np.concatenate(part)) for part in parts))


def tied(values: np.ndarray) -> np.ndarray:
    """Groups of rows by the values of a column; of lists, rows linked by what they share.

    Example:
        >>> lists = np.array([[1, 2], [3], [2, 4], [4]], dtype=object)
        >>> tied(lists).tolist()
        [0, 1, 0, 0]
    """
    if not len(values) or not isinstance(values[0], np.ndarray | list):
        return values
    # Here, because it is slow to import.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = np.repeat(np.arange(len(values)), [len(value) for value in values])
    _, things = np.unique(np.concatenate([*values]), return_inverse=True)
    size = len(values) + things.max(initial=-1) + 1
    links = coo_array((np.ones(len(rows)), (rows, len(values) + things)), shape=(size, size))
    return connected_components(links, directed=False)[1][: len(values)]


def _split_groups(
    labels: np.ndarray, fractions: tuple[float, float, float], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    _, val, test = fractions
    everything = np.arange(len(labels))
    # Counts, because sums of decimal fractions round up to one row too many.
    n_val, n_test = round(val * len(labels)), round(test * len(labels))
    counts, parts = np.bincount(labels), 3 if val else 2
    smallest = int(counts[counts > 0].min())
    if smallest < parts:
        raise DataError(
            f"expected at least {parts} rows or groups of every class, one for each part, got "
            f"{smallest} of class {int(np.flatnonzero(counts == smallest)[0])} (smallest class: "
            f"{smallest}); leave that class out"
        )
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
    except ValueError:
        # The fractions of so few leave a class out of a part.
        return _deal_classes(labels, (val, test), seed)
    return kept, held, tested


def _deal_classes(
    labels: np.ndarray, fractions: tuple[float, float], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deal each class alone: fractions of it, but at least one, to validate on and to test on."""
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held, tested = (max(1, round(share * len(rows))) if share else 0 for share in fractions)
        tested = min(tested, len(rows) - held - 1)
        dealt = np.split(rows, [len(rows) - held - tested, len(rows) - tested])
        for part, own in zip(parts, dealt, strict=True):
            part.append(own)
    kept, held, tested = (np.sort(np.concatenate(part)) for part in parts)
    return kept, held, tested
