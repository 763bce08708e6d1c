"""Which adapters are not independent in a test: copies, near copies, equal starts."""

import tempfile
from collections.abc import Iterator
from math import isqrt

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lora_ws.adapters import Layout
from lora_ws.adapters.layout import LayerSpec
from lora_ws.audit.dedup import groups
from lora_ws.audit.similar import Index
from lora_ws.collection import AdapterSet
from lora_ws.functional.update_modules import Module
from lora_ws.memory import blocks

# Layers whose row spaces are compared, and the share in common from which a start is one.
LAYERS, SAME_START = 4, 0.5
# What a pair of adapters takes, and a number of one of their layers.
PAIR_BYTES, ROW_BYTES = 32, 16


def update_groups(
    adapters: AdapterSet, rows: Int[np.ndarray, " chosen"] | None = None
) -> Int[np.ndarray, " chosen"]:
    """Number the groups of adapters with equal or nearly equal updates; see `dedup.groups`.

    Args:
        adapters: that are read one after the other.
        rows: some of them; None takes all.
    """
    chosen = np.arange(len(adapters)) if rows is None else rows
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(folder, ((f"{k}", _modules(adapters, k)) for k in chosen.tolist()))
        return groups(index).near


def most_rows(layout: Layout, room: int) -> int:
    """How many adapters `start_groups` compares in so many bytes.

    Example:
        >>> most_rows(Layout.sd15_qv(), 1 << 30)
        5792
    """
    widest = max(layer.rank * layer.in_features for layer in _compared(layout))
    return min(isqrt(room // PAIR_BYTES), room // (ROW_BYTES * widest))


def start_groups(
    weights: Float[np.ndarray, "adapters params"],
    layout: Layout,
    chosen: Int[np.ndarray, " chosen"] | None = None,
) -> Int[np.ndarray, " chosen"]:
    """Number the groups of adapters that began with the same A.

    Training hardly turns A, so adapters of one start share the space of its rows; those of
    different starts share ``rank / in_features`` of it. The space does not depend on how an update
    is split into B and A.

    Args:
        weights: rows.
        layout: their columns; four layers spread over it are compared.
        chosen: some of the rows; None takes all.

    Example:
        >>> layout, rng = Layout.known("tiny_sd_qv"), np.random.default_rng(0)
        >>> rows = rng.standard_normal((3, layout.size), dtype=np.float32)
        >>> rows[2] = 1.01 * rows[0]
        >>> start_groups(rows, layout).tolist()
        [0, 1, 0]
    """
    n, columns = len(weights) if chosen is None else len(chosen), list(layout.pairs())
    compared = _compared(layout)
    shared = np.zeros((n, n))
    for layer, down, _ in columns:
        if layer not in compared:
            continue
        own = weights[:, down] if chosen is None else weights[:, down][chosen]
        rows = np.asarray(own, np.float64).reshape(-1, *layer.down_shape)
        values, vectors = np.linalg.eigh(rows @ rows.transpose(0, 2, 1))
        kept = values > 1e-6 * values[:, -1:]
        inverse = np.where(kept, 1 / np.sqrt(np.where(kept, values, 1)), 0)
        basis = inverse[:, :, None] * (vectors.transpose(0, 2, 1) @ rows)
        flat = basis.reshape(-1, layer.in_features)
        rank = np.maximum(kept.sum(axis=1), 1)
        for part in blocks(n, 8 * n * layer.rank**2):
            overlap = (basis[part].reshape(-1, layer.in_features) @ flat.T) ** 2
            sums = overlap.reshape(-1, layer.rank, n, layer.rank).sum(axis=(1, 3))
            shared[part] += sums / np.minimum.outer(rank[part], rank)
    return _linked(shared >= SAME_START * len(compared))


def _compared(layout: Layout) -> list[LayerSpec]:
    layers = list(layout.layers)
    return layers[:: max(1, len(layers) // LAYERS)][:LAYERS]


def joined(*labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Number the groups in which each of several groupings is whole.

    Example:
        >>> joined(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])).tolist()
        [0, 0, 0, 1]
    """
    return _linked(np.any([np.equal.outer(one, one) for one in labels], axis=0))


def _linked(links: np.ndarray) -> np.ndarray:
    return connected_components(coo_array(links), directed=False)[1].astype(np.int64)


def _modules(adapters: AdapterSet, row: int) -> Iterator[Module]:
    weights = np.asarray(adapters.weights[row])
    for layer, down, up in adapters.layout.pairs():
        a, b = weights[down].reshape(layer.down_shape), weights[up].reshape(layer.up_shape)
        yield layer.name, a, b, 1.0
