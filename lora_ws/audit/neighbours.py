"""Approximate search in many sketches: a graph of neighbours that `usearch` builds and walks.

The graph (Malkov and Yashunin 2018, "hierarchical navigable small worlds") is a file beside the
sketches, made when it is first needed; rows added since are linked in before the next search.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from jaxtyping import Float, Int

from lora_ws.errors import NotAvailableError

GRAPH = "graph.usearch"
# Candidates to look at for each query, beyond those asked for: recall for time.
_EXPANSION = 128
_BATCH = 8192


def graph_search(
    folder: Path,
    sketches: Float[np.ndarray, "n size"],
    units: Float[np.ndarray, "q size"],
    top: int,
) -> Int[np.ndarray, "q top"]:
    """Rows that are likely to have the highest inner products.

    Args:
        folder: where the graph is kept.
        sketches: unit rows.
        units: queries.
        top: how many, from 1 to n.

    Returns:
        Row numbers ``[q, top]``, in no particular order.

    Raises:
        NotAvailableError: `usearch` is not installed.
    """
    graph = _graph(folder / GRAPH, sketches)
    found = (graph.search(unit, top).keys.astype(np.int64) for unit in units)
    return np.array([_filled(keys[keys < len(sketches)], top) for keys in found])


def _graph(path: Path, sketches: np.ndarray) -> Any:
    try:
        from usearch.index import Index as Graph
    except ImportError as error:
        raise NotAvailableError(
            "expected the library `usearch` for approximate search; install it with "
            "`pip install 'lora_ws[audit]'`, or pass approximate=False to compare with every row"
        ) from error
    graph = Graph(ndim=sketches.shape[1], metric="ip", dtype="f16", expansion_search=_EXPANSION)
    with FileLock(path.with_suffix(".lock")):
        if _opened(graph, path, graph.view) < len(sketches):
            _opened(graph, path, graph.load)
            for start in range(len(graph), len(sketches), _BATCH):
                block = np.asarray(sketches[start : start + _BATCH])
                graph.add(np.arange(start, start + len(block)), block)
            graph.save(str(path.with_suffix(".partial")))
            path.with_suffix(".partial").replace(path)
    return graph


def _opened(graph: Any, path: Path, how: Callable[[str], None]) -> int:
    """How many rows the graph of the file holds; a damaged file is none."""
    graph.reset()
    if path.is_file():
        try:
            how(str(path))
        except (RuntimeError, ValueError):
            graph.reset()
    return len(graph)


def _filled(keys: np.ndarray, top: int) -> np.ndarray:
    """Any other rows for those that the walk did not reach, or that were added since."""
    others = np.setdiff1d(np.arange(top), keys)[: top - len(keys)]
    return np.concatenate([keys, others])
