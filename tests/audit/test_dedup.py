"""Groups of equal and near adapters, against every pair at once."""

import numpy as np
import pytest
from copies import adapters, brain, half, rounded, split_anew
from scipy.sparse.csgraph import connected_components

from lora_ws.audit import dedup
from lora_ws.audit.dedup import groups, members
from lora_ws.audit.similar import Index, Signature
from lora_ws.errors import ConfigError


@pytest.mark.slow
def test_copies_of_real_adapters_are_grouped_and_twins_are_near(mini, twins, tmp_path):
    kinds = {
        "plain": adapters(mini.select(slice(60))),
        "half": {n: rounded(m, half) for n, m in adapters(mini.select(slice(40))).items()},
        "brain": {n: rounded(m, brain) for n, m in adapters(mini.select(slice(40))).items()},
        "split": {n: split_anew(m) for n, m in adapters(mini.select(slice(40))).items()},
        "twin": adapters(twins.select(slice(20))),
    }
    given = [(f"{kind} {n}", m) for kind, found in kinds.items() for n, m in found.items()]
    index = Index.build(tmp_path, given)
    found = groups(index)
    names = np.array(index.rows["name"].to_pylist())
    equal = {frozenset(names[rows]) for rows in members(found.equal)}
    copies = ("plain", "half", "brain", "split")
    assert equal == {frozenset(f"{kind} {n}" for kind in copies) for n in range(40)}
    near = {frozenset(names[rows]) for rows in members(found.near)}
    with_twins = {frozenset(f"{kind} {n}" for kind in (*copies, "twin")) for n in range(20)}
    assert near == with_twins | {s for s in equal if not s & frozenset().union(*with_twins)}


def clustered(n, size, seed):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n // 4, size))
    noise = rng.standard_normal((n, size)) * rng.choice([1e-4, 0.3, 1.0], n)[:, None]
    return (centres[rng.integers(len(centres), size=n)] + noise) * rng.choice([1, 1, 2], n)[:, None]


@pytest.mark.parametrize("tile", [5, 16, 1000])
def test_groups_are_the_components_of_the_whole_matrix(tmp_path, monkeypatch, tile):
    monkeypatch.setattr(dedup, "_TILE", tile)
    rows = clustered(83, 16, 3)
    norms = np.linalg.norm(rows, axis=1)
    signatures = [Signature(r, n, f"{k}") for k, (r, n) in enumerate(zip(rows, norms, strict=True))]
    index = Index.build(tmp_path, side=4).append([f"a{k}" for k in range(83)], signatures)
    cosine = rows @ rows.T / np.outer(norms, norms)
    alike = np.abs(norms / norms[:, None] - 1) < 1e-3
    found = groups(index, equal=0.9999, near=0.9)
    for labels, graph in ((found.equal, (cosine > 0.9999) & alike), (found.near, cosine > 0.9)):
        expected = connected_components(graph, directed=False)[1]
        np.testing.assert_array_equal(labels == labels[:, None], expected == expected[:, None])
        assert 10 < len(set(labels.tolist())) < 83
        # Numbered by their first rows.
        assert np.unique(labels, return_index=True)[1].tolist() == sorted(
            np.unique(labels, return_index=True)[1].tolist()
        )
    assert len(set(found.near.tolist())) < len(set(found.equal.tolist()))


def test_updates_of_zero_are_equal_to_each_other_alone(tmp_path):
    one = [("to_v", np.ones((1, 3)), np.ones((2, 1)), 1.0)]
    given = {
        "one": one,
        "zero": [("to_v", np.ones((1, 3)), np.zeros((2, 1)), 1.0)],
        "none": [],
        "nothing": [("to_q", np.ones((1, 3)), np.ones((2, 1)), 0.0)],
    }
    found = groups(Index.build(tmp_path, given.items()))
    assert found.equal.tolist() == found.near.tolist() == [0, 1, 1, 1]


def test_an_empty_index_has_no_groups(tmp_path):
    found = groups(Index.build(tmp_path))
    assert found.equal.size == found.near.size == 0
    assert members(found.equal) == []


@pytest.mark.parametrize(("equal", "near"), [(0.9, 0.95), (1.1, 0.9), (0.9, 0.0)])
def test_thresholds_out_of_order_are_refused(tmp_path, equal, near):
    with pytest.raises(ConfigError, match="near <= equal"):
        groups(Index.build(tmp_path), equal, near)
