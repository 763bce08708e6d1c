"""Approximate search: it finds what comparing with every row finds."""

import sys

import numpy as np
import pytest
from tolerances import rounding

from lora_ws.audit import similar
from lora_ws.audit.neighbours import GRAPH
from lora_ws.audit.similar import Index, Signature
from lora_ws.errors import NotAvailableError


def signatures(n, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, 64))
    return [Signature(row, 1.0, "") for row in rows]


@pytest.fixture
def index(tmp_path):
    names = [f"a{k}" for k in range(3000)]
    return Index.build(tmp_path, side=8).append(names, signatures(3000))


def queries(index, rows):
    noise = np.random.default_rng(1).standard_normal((len(rows), 64)) / 20
    return index.sketches[rows] + noise


def test_without_the_library_the_error_says_what_to_do(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    monkeypatch.setattr(similar, "EXACT_ROWS", 100)
    with pytest.raises(NotAvailableError, match=r"lora_ws\[audit\].*approximate=False"):
        index.query(index.sketches[0])
    assert index.search(index.sketches[:1], approximate=False).rows[0, 0] == 0


def test_graph_finds_nearly_what_every_row_gives(index):
    pytest.importorskip("usearch")
    rows = np.arange(0, 3000, 30)
    exact = index.search(queries(index, rows), 5)
    found = index.search(queries(index, rows), 5, approximate=True)
    np.testing.assert_array_equal(found.rows[:, 0], rows)
    rtol = rounding(index.sketches.shape[1])
    np.testing.assert_allclose(found.cosine[:, 0], exact.cosine[:, 0], rtol=rtol)
    recall = np.mean(
        [len(set(a) & set(b)) / 5 for a, b in zip(exact.rows, found.rows, strict=True)]
    )
    assert recall > 0.8


@pytest.mark.slow
def test_every_row_can_be_reached_in_a_graph_that_is_always_the_same(index):
    pytest.importorskip("usearch")
    graphs = []
    for _ in range(2):
        found = index.search(index.sketches, 1, approximate=True)
        np.testing.assert_array_equal(found.rows[:, 0], np.arange(3000))
        graphs.append((index.folder / GRAPH).read_bytes())
        (index.folder / GRAPH).unlink()
    # Rows that are linked in at once by several threads can be lost, and never twice the same.
    assert graphs[0] == graphs[1]


def test_large_indexes_take_the_graph_which_takes_in_new_rows(index, monkeypatch):
    pytest.importorskip("usearch")
    monkeypatch.setattr(similar, "EXACT_ROWS", 100)
    index.query(index.sketches[5])
    graph = index.folder / GRAPH
    before = graph.stat().st_size
    later = index.append([f"b{k}" for k in range(500)], signatures(500, seed=2))
    assert later.query(later.sketches[3123], top=1)[0].name == "b123"
    assert graph.stat().st_size > before
    # An index opened before has no such rows.
    found = index.search(later.sketches[3100:3200], 4)
    assert found.rows.max() < 3000
    assert [len(set(rows)) for rows in found.rows.tolist()] == [4] * 100


def test_a_damaged_graph_is_made_anew(index):
    pytest.importorskip("usearch")
    (index.folder / GRAPH).write_bytes(b"no graph" * 100)
    rows = np.arange(50)
    found = index.search(queries(index, rows), 3, approximate=True)
    np.testing.assert_array_equal(found.rows[:, 0], rows)


def test_as_many_as_there_are_can_be_asked_for(tmp_path):
    pytest.importorskip("usearch")
    index = Index.build(tmp_path, side=8).append(["a", "b", "c"], signatures(3))
    found = index.search(index.sketches[:2], 10, approximate=True)
    assert sorted(found.rows[0].tolist()) == [0, 1, 2]
    assert (
        len(
            Index.build(tmp_path / "empty", side=8).search(index.sketches, 3, approximate=True).rows
        )
        == 3
    )
