"""Retrieval, nearest neighbours and one-class scores of embeddings, in plain numpy."""

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.covariance import LedoitWolf

from lora_ws.errors import ConfigError


def average_precisions(
    similarities: Float[np.ndarray, "queries gallery"],
    relevant: Bool[np.ndarray, "queries gallery"],
    excluded: Bool[np.ndarray, "queries gallery"],
) -> Float[np.ndarray, " queries"]:
    """Average precision of each query over all of its relevant gallery rows.

    Args:
        similarities: the higher, the earlier a row is retrieved.
        relevant: which rows a query asks for.
        excluded: rows that a query does not see, such as those of the same photos.

    Returns:
        The precision at the rank of each relevant row, averaged; NaN where none is relevant.

    Example:
        >>> found = np.array([[0.9, 0.5, 0.1]]), np.array([[True, False, True]])
        >>> average_precisions(*found, np.zeros((1, 3), bool)).round(3)
        array([0.833])
    """
    kept = np.where(excluded, -np.inf, similarities)
    order = np.argsort(-kept, axis=1, kind="stable")
    hits = np.take_along_axis(relevant & ~excluded, order, axis=1)
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    count = hits.sum(axis=1)
    return np.where(count > 0, (precision * hits).sum(axis=1) / np.maximum(count, 1), np.nan)


def chance_average_precision(
    relevant: Int[np.ndarray, " queries"], gallery: Int[np.ndarray, " queries"]
) -> Float[np.ndarray, " queries"]:
    """Expected average precision of a random order.

    With R relevant of N rows, a row at rank k is relevant with probability R / N, and then each
    of the k - 1 rows before it is with (R - 1) / (N - 1).

    Args:
        relevant: how many rows of the gallery are relevant.
        gallery: how many there are.

    Returns:
        The expectation of each query; NaN where none is relevant.

    Example:
        >>> chance_average_precision(np.array([1]), np.array([2]))
        array([0.75])
    """
    share = (relevant - 1) / np.maximum(gallery - 1, 1)
    longest = int(gallery.max(initial=0))
    harmonic = np.append(0.0, (1 / np.arange(1, longest + 1)).cumsum())[gallery]
    found = share + (1 - share) * harmonic / np.maximum(gallery, 1)
    return np.where(relevant > 0, found, np.nan)


def nearest_classes(
    similarities: Float[np.ndarray, "queries gallery"],
    labels: Int[np.ndarray, " gallery"],
    excluded: Bool[np.ndarray, "queries gallery"],
    k: int,
) -> Int[np.ndarray, " queries"]:
    """Name the class that most of the k nearest rows have; ties go to the larger similarity sum.

    Args:
        similarities: of queries and gallery rows.
        labels: classes of the gallery rows.
        excluded: rows that a query does not see.
        k: how many rows vote.

    Returns:
        The class of each query; -1 where it sees no row.

    Raises:
        ConfigError: k is not positive.

    Example:
        >>> near, none = np.array([[0.9, 0.5, 0.3]]), np.zeros((1, 3), bool)
        >>> nearest_classes(near, np.array([1, 0, 0]), none, k=2)
        array([1])
    """
    if k < 1:
        raise ConfigError(f"k: expected at least 1, got {k}")
    kept = np.where(excluded, -np.inf, similarities)
    nearest = np.argsort(-kept, axis=1, kind="stable")[:, :k]
    values, members = np.take_along_axis(kept, nearest, axis=1), labels[nearest]
    seen = np.isfinite(values)
    classes = int(labels.max(initial=0)) + 1
    votes, sums = np.zeros((2, len(kept), classes))
    rows = np.broadcast_to(np.arange(len(kept))[:, None], members.shape)
    np.add.at(votes, (rows[seen], members[seen]), 1)
    np.add.at(sums, (rows[seen], members[seen]), values[seen])
    tied = votes == votes.max(axis=1, keepdims=True)
    return np.where(seen.any(axis=1), np.where(tied, sums, -np.inf).argmax(axis=1), -1)


def neighbour_distance(
    known: Float[np.ndarray, "known width"], rows: Float[np.ndarray, "rows width"], k: int = 2
) -> Float[np.ndarray, " rows"]:
    """Score how strange rows are to a class: mean squared distance to its k nearest known rows.

    Args:
        known: embeddings of the class.
        rows: embeddings to score.
        k: how many known rows count; all, where there are fewer.

    Example:
        >>> neighbour_distance(np.array([[0.0], [1.0], [5.0]]), np.array([[0.0], [3.0]]))
        array([0.5, 4. ])
    """
    squares = ((rows[:, None] - known[None]) ** 2).sum(-1)
    return np.sort(squares, axis=1)[:, :k].mean(axis=1)


def mahalanobis_distance(
    known: Float[np.ndarray, "known width"], rows: Float[np.ndarray, "rows width"]
) -> Float[np.ndarray, " rows"]:
    """Score how strange rows are to a class: squared Mahalanobis distance from its mean.

    The covariance is shrunk (Ledoit and Wolf 2004), as a class has fewer rows than columns.

    Args:
        known: embeddings of the class, at least two.
        rows: embeddings to score.
    """
    return LedoitWolf().fit(known).mahalanobis(rows)
