"""Approximate search in many sketches: a graph of neighbours that `usearch` builds and walks.

The graph (Malkov and Yashunin 2018, "hierarchical navigable small worlds") is a file beside the
sketches, made when it is first needed; rows added since are linked in before the next search.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from lora_ws.errors import NotAvailableError
from lora_ws.journal import locked

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
    """The graph of at least these rows, mapped."""
    graph = _mapped(path, _stamp_of(path), sketches.shape[1])
    if len(graph) < len(sketches):
        # Windows replaces no file that is mapped.
        del graph
        _mapped.cache_clear()
        path.parent.mkdir(exist_ok=True)
        with locked(path.with_suffix(".lock")):
            grown = _opened(path, sketches.shape[1], "load")
            for start in range(len(grown), len(sketches), _BATCH):
                block = np.asarray(sketches[start : start + _BATCH])
                # Threads that add at once leave rows that no search reaches (USearch issue 735).
                grown.add(np.arange(start, start + len(block)), block, threads=1)
            grown.save(str(path.with_suffix(".partial")))
            path.with_suffix(".partial").replace(path)
        graph = _mapped(path, _stamp_of(path), sketches.shape[1])
    return graph


@lru_cache(maxsize=1)
def _mapped(path: Path, _stamp: tuple[int, ...], width: int) -> Any:
    """A mapped graph, kept until its file is another: opening one takes as long as many queries."""
    return _opened(path, width, "view")


def _stamp_of(path: Path) -> tuple[int, ...]:
    """What distinguishes a file from one that took its place."""
    if not path.is_file():
        return ()
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _opened(path: Path, width: int, how: Literal["view", "load"]) -> Any:
    """The graph of a file; an empty one where there is none or it is damaged."""
    try:
        from usearch.index import Index as Graph
    except ImportError as error:
        raise NotAvailableError(
            "expected the library `usearch` for approximate search; install it with "
            "`pip install 'lora_ws[audit]'`, or pass approximate=False to compare with every row"
        ) from error
    graph = Graph(ndim=width, metric="ip", dtype="f16", expansion_search=_EXPANSION)
    if path.is_file():
        try:
            getattr(graph, how)(str(path))
        except (RuntimeError, ValueError):
            graph.reset()
    return graph


def _filled(keys: np.ndarray, top: int) -> np.ndarray:
    """Any other rows for those that the walk did not reach, or that were added since."""
    others = np.setdiff1d(np.arange(top), keys)[: top - len(keys)]
    return np.concatenate([keys, others])
