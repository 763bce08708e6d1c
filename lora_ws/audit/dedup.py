"""Which adapters of an index are copies of each other, and which are nearly."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lora_ws.audit.similar import EQUAL, NEAR, Index, is_partial, same_update
from lora_ws.errors import ConfigError

# A tile of nothing but near pairs takes tens of MiB, whatever the size of the index.
_TILE = 1024


class Groups(NamedTuple):
    """A group number for each row of an index, by each of two rules.

    Attributes:
        equal: of updates that are the same numbers, or the same but for rounding.
        near: of updates that a chain of near ones links; each holds whole groups of equal ones.
    """

    equal: Int[np.ndarray, " n"]
    near: Int[np.ndarray, " n"]


def groups(index: Index, equal: float = EQUAL, near: float = NEAR) -> Groups:
    """Group the adapters of an index by comparing every two of them, tile by tile.

    Two are equal if `update_hash` is, or if their sketches have a cosine of at least ``equal`` and
    norms agree, and their files hold nothing else; near if the cosine is at least ``near``, at any
    norm, so that the same update at another strength is near. Groups are connected components: the
    ends of a long chain of near adapters may have little in common. Time grows with the square of
    the rows, memory does not.

    Args:
        index: of adapters.
        equal: least cosine of equal ones.
        near: least cosine of near ones.

    Returns:
        Group numbers in the order of the first rows of the groups.

    Raises:
        ConfigError: if not ``0 < near <= equal <= 1``.
    """
    if not 0 < near <= equal <= 1:
        raise ConfigError(
            f"expected 0 < near <= equal <= 1, got near={near} and equal={equal}; "
            f"{NEAR} and {EQUAL} are the defaults"
        )
    norms = np.array(index.rows["norm"].to_pylist())
    # One hash is one number to begin with, which links rows of updates of zero too.
    hashes = index.rows["hash"].to_pylist()
    # One that was not computed tells nothing.
    hashes = np.array([found or f"row {row}" for row, found in enumerate(hashes)], object)
    same = np.unique(hashes, return_inverse=True)[1].astype(np.int64)
    whole = ~np.array([is_partial(found) for found in hashes], bool)
    alike = same.copy()
    for first, second, cosine in _pairs(index.sketches, near):
        exact = same_update(cosine, norms[first], norms[second], equal)
        exact &= whole[first] & whole[second]
        same = _joined(same, first[exact], second[exact])
        alike = _joined(alike, first, second)
    return Groups(_in_order(same), _in_order(alike))


class Copies(NamedTuple):
    """Names of adapters in groups of at least two, the largest group first.

    Attributes:
        equal: of equal updates.
        near: of near ones, where they are not all equal.
    """

    equal: list[list[str]]
    near: list[list[str]]

    @property
    def counted(self) -> str:
        """How many groups there are.

        Example:
            >>> Copies([["a", "b"]], []).counted
            'groups of equal updates: 1, of near ones: 0'
        """
        return f"groups of equal updates: {len(self.equal)}, of near ones: {len(self.near)}"


def copies(index: Index, equal: float = EQUAL, near: float = NEAR) -> Copies:
    """Group the adapters of an index by name; see `groups`."""
    found, names = groups(index, equal, near), index.rows["name"].to_pylist()
    alike = [rows for rows in members(found.near) if len(set(found.equal[rows])) > 1]
    named = (
        [[names[row] for row in rows] for rows in part] for part in (members(found.equal), alike)
    )
    return Copies(*named)


def members(labels: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " size"]]:
    """List the rows of groups of at least two, the largest group first.

    Args:
        labels: group number of each row.

    Example:
        >>> [rows.tolist() for rows in members(np.array([0, 1, 0, 2, 1, 0]))]
        [[0, 2, 5], [1, 4]]
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    found = np.split(order, starts[1:]) if len(labels) else []
    return sorted((rows for rows in found if len(rows) > 1), key=lambda rows: (-len(rows), rows[0]))


def _pairs(
    sketches: np.ndarray, least: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows i < j of every tile whose cosine is at least that, with the cosine."""
    for start in range(0, len(sketches), _TILE):
        mine = np.asarray(sketches[start : start + _TILE])
        for other in range(start, len(sketches), _TILE):
            cosine = mine @ sketches[other : other + _TILE].T
            alike = cosine >= least
            first, second = np.nonzero(np.triu(alike, 1) if other == start else alike)
            if len(first):
                yield first + start, second + other, cosine[first, second]


def _joined(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Link the groups of rows ``first`` with those of ``second``."""
    mine, others = labels[first], labels[second]
    new = mine != others
    if not new.any():
        return labels
    from scipy.sparse import coo_array  # slow to import, and most indexes hold no copies
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(new.sum(), bool), (mine[new], others[new])), (len(labels),) * 2)
    return connected_components(links, directed=False)[1][labels]


def _in_order(labels: np.ndarray) -> np.ndarray:
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers]
