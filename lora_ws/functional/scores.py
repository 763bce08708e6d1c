"""Outputs of simple networks in numpy: kernel machines, and layers with ReLU between them."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float

Kernel = Literal["linear", "poly", "rbf", "sigmoid", "precomputed"]
# Kernels whose machine is linear in the row, so that no vectors are needed.
LINEAR = ("linear", "precomputed")


def perceptron(
    rows: Float[np.ndarray, "rows features"],
    weights: Sequence[Float[np.ndarray, "_ _"]],
    biases: Sequence[Float[np.ndarray, " _"]],
) -> Float[np.ndarray, "rows outputs"]:
    """Multiply and add, layer by layer; what is negative between two layers becomes 0.

    Args:
        rows: a vector each.
        weights: of each layer ``[outputs, inputs]``.
        biases: of each layer ``[outputs]``.

    Example:
        >>> perceptron(np.ones((1, 2)), [-np.eye(2), np.ones((1, 2))], [np.zeros(2), np.ones(1)])
        array([[1.]])
    """
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rows = (np.maximum(rows, 0) if layer else rows) @ weight.T + bias
    return rows


def kernel_values(
    rows: Float[np.ndarray, "rows features"],
    vectors: Float[np.ndarray, "vectors features"],
    kernel: Kernel,
    gamma: float,
    coef0: float,
    degree: int,
) -> Float[np.ndarray, "rows terms"]:
    """Kernel of rows with vectors; the rows themselves where it is linear or precomputed.

    Args:
        rows: a vector each.
        vectors: what they are compared with.
        kernel: as scikit-learn names it.
        gamma: scale.
        coef0: what poly and sigmoid add.
        degree: of poly.

    Example:
        >>> kernel_values(np.ones((1, 2)), np.zeros((1, 2)), "rbf", 0.5, 0.0, 3).round(3)
        array([[0.368]])
    """
    if kernel in LINEAR:
        return rows
    if kernel == "rbf":
        # Differences, because inner products cancel where rows are near.
        squares = [np.square(row - vectors).sum(axis=1) for row in rows]
        return np.exp(-gamma * np.reshape(squares, (len(rows), len(vectors))))
    products = gamma * rows @ vectors.T + coef0
    return np.tanh(products) if kernel == "sigmoid" else products**degree


def pair_scores(
    margins: Float[np.ndarray, "rows pairs"], classes: int
) -> Float[np.ndarray, "rows classes"]:
    """Votes of classifiers of pairs, ties broken by margins; of two classes, half the margin each.

    Votes and summed margins go together as in scikit-learn's ``decision_function`` with
    ``decision_function_shape="ovr"``: the class with the highest score is what ``predict`` returns
    with ``break_ties=True``.

    Args:
        margins: how far each pair's classifier decides for its first class; pairs in order.
        classes: how many.

    Example:
        >>> pair_scores(np.array([[1.0, 1.0, -2.0]]), 3).argmax()
        np.int64(0)
    """
    pairs = np.array(list(combinations(range(classes), 2)))
    first, second = np.eye(classes, dtype=margins.dtype)[pairs.T]
    if len(pairs) == 1:
        return margins @ (first - second) / 2
    lost = (margins < 0).astype(margins.dtype)
    votes, sums = (1 - lost) @ first + lost @ second, margins @ (first - second)
    return votes + sums / (3 * (np.abs(sums) + 1))


def check_state(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a network's state whose names or shapes are others.

    Raises:
        ValueError: they are.

    Example:
        >>> check_state({"bias": np.zeros(2)}, {"bias": (2,)})
    """
    found = {name: value.shape for name, value in state.items()}
    if found != dict(shapes):
        raise ValueError(f"expected a state of {dict(shapes)}, got {found}")
