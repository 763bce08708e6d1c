"""Shapley values: what each player adds on average, whoever came before (Shapley 1953).

Leaving one out hides what two do alike; averaging over all orders does not.
"""

from collections.abc import Callable
from math import factorial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lora_ws.errors import ConfigError

# Up to here every subset is looked at: 64 of them.
MOST_EXACT = 6


class Shapley(NamedTuple):
    """Values of k players, and how uncertain they are.

    Attributes:
        values: they sum to what all players are worth more than none.
        errors: standard errors of sampled values; zeros of exact ones.
        subsets: how many were looked at.
    """

    values: Float[np.ndarray, " k"]
    errors: Float[np.ndarray, " k"]
    subsets: int


Worth = Callable[[Bool[np.ndarray, "m k"]], Float[np.ndarray, " m"]]


def shapley(worth: Worth, players: int, *, permutations: int = 50, seed: int = 0) -> Shapley:
    """Shapley values, exact up to `MOST_EXACT` players and from random orders beyond.

    Args:
        worth: of subsets, one per row; all that are needed are asked for at once, each once.
        players: how many.
        permutations: how many orders are drawn.
        seed: of these.

    Example:
        >>> shapley(lambda rows: rows @ np.array([1.0, 3.0]), 2).values.tolist()
        [1.0, 3.0]
    """
    if players < 1 or permutations < 2:
        raise ConfigError(
            f"expected at least 1 player and 2 permutations, got {players} and {permutations}"
        )
    if players <= MOST_EXACT:
        subsets = subsets_of(players)
        return Shapley(exact(worth(subsets)), np.zeros(players), len(subsets))
    return _sampled(worth, players, permutations, np.random.default_rng(seed))


def subsets_of(players: int) -> Bool[np.ndarray, "subsets players"]:
    """All subsets; player i is bit i of the row's number."""
    numbers = np.arange(2**players)
    return (numbers[:, None] >> np.arange(players) & 1).astype(bool)


def exact(worth: Float[np.ndarray, " subsets"]) -> Float[np.ndarray, " k"]:
    """Shapley values from the worth of every subset, in the order of `subsets_of`."""
    players = len(worth).bit_length() - 1
    numbers, sizes = np.arange(len(worth)), subsets_of(players).sum(axis=1)
    chances = [
        factorial(size) * factorial(players - size - 1) / factorial(players)
        for size in range(players)
    ]
    values = np.empty(players)
    for player in range(players):
        before = numbers[(numbers >> player & 1) == 0]
        gains = worth[before | 1 << player] - worth[before]
        values[player] = gains @ np.take(chances, sizes[before])
    return values


def _sampled(worth: Worth, players: int, permutations: int, rng: np.random.Generator) -> Shapley:
    orders = rng.permuted(np.tile(np.arange(players), (permutations, 1)), axis=1)
    # Row j of an order: those that came before the j-th.
    rank = orders.argsort(axis=1)
    joined = rank[:, None, :] < np.arange(players + 1)[None, :, None]
    unique, at = np.unique(joined.reshape(-1, players), axis=0, return_inverse=True)
    worths = worth(unique)[at.ravel()].reshape(permutations, players + 1)
    gains = np.take_along_axis(np.diff(worths, axis=1), rank, axis=1)
    errors = gains.std(axis=0, ddof=1) / np.sqrt(permutations)
    return Shapley(gains.mean(axis=0), errors, len(unique))
