"""Elementwise products of two low-rank products as factors, against the dense matrix."""

import numpy as np
import pytest
from tolerances import EXACT

from lora_ws.functional import update_hash as hashing
from lora_ws.functional.hadamard import PairProducts, hadamard_norm
from lora_ws.functional.measure import measure
from lora_ws.functional.sketch import module_norms, sketch
from lora_ws.functional.update_hash import update_hash

Sides = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sides(seed: int = 0, ranks: tuple[int, int] = (3, 2)) -> Sides:
    """A and B of one product ``[20, 16]``, then of the other."""
    random = np.random.default_rng(seed)
    one, other = ranks
    shapes = ((one, 16), (20, one), (other, 16), (20, other))
    a, b, c, d = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return a, b, c, d


def pair(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray
) -> tuple[PairProducts, PairProducts]:
    return PairProducts(a, c), PairProducts(b.T, d.T, columns=True)


def dense(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    wide = [side.astype(np.float64) for side in (a, b, c, d)]
    return (wide[1] @ wide[0]) * (wide[3] @ wide[2])


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (4, 4)])
@pytest.mark.parametrize("block", [1, 16 * 7, 1 << 18])
def test_products_and_norm_are_those_of_the_matrix(
    ranks: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_ws.functional.hadamard.BLOCK", block)
    some = sides(ranks=ranks)
    down, up = (side.astype(float) for side in pair(*some))
    whole = dense(*some)
    np.testing.assert_allclose(up.form() @ down.form(), whole, atol=EXACT)
    assert down.form().shape == down.shape
    assert up.form().shape == up.shape
    assert hadamard_norm(down, up) == pytest.approx(np.linalg.norm(whole), rel=EXACT)
    left, right = (np.random.default_rng(1).standard_normal(s) for s in ((5, 20), (16, 6)))
    np.testing.assert_allclose((left @ up) @ (down @ right), left @ whole @ right, atol=EXACT)
    rows = (slice(4, 9), slice(0, 2))
    kept = np.concatenate([whole[part] for part in rows])
    np.testing.assert_allclose(up.take(rows).form() @ down.form(), kept, atol=EXACT)
    assert hadamard_norm(down, up.take(rows)) == pytest.approx(np.linalg.norm(kept), rel=EXACT)


def test_a_module_is_measured_as_the_dense_one() -> None:
    some = sides()
    modules = [("to_v", *pair(*some), -0.5)]
    formed = [("to_v", np.eye(16), dense(*some), -0.5)]
    np.testing.assert_allclose(sketch(modules), sketch(formed), atol=EXACT)
    np.testing.assert_allclose(module_norms(modules), 0.5 * np.linalg.norm(dense(*some)))
    (one,) = measure([modules])
    np.testing.assert_allclose(one.sketch, sketch(formed), atol=EXACT)
    np.testing.assert_allclose(one.norms, 0.5 * np.linalg.norm(dense(*some)))


def test_norms_neither_over_nor_underflow() -> None:
    a, b, c, d = sides()
    for size in (1e30, 1e-30):
        down, up = pair(a * np.float32(size), b * np.float32(1 / size), c * np.float32(size), d)
        expected = size * np.linalg.norm(dense(a, b, c, d))
        assert hadamard_norm(down, up) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("formed", [0, 1 << 23])
def test_hash_is_blind_to_what_changes_without_rounding(
    formed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "FORMED", formed)
    a, b, c, d = sides()
    known = update_hash([("to_v", *pair(a, b, c, d), 0.3)])
    assert measure([[("to_v", *pair(a, b, c, d), 0.3)]])[0].hash == known
    order = [2, 0, 1]
    powers = np.array([2.0, -0.5, 8.0], np.float32)
    same = {
        "order": (a[order], b[:, order], c, d),
        "powers and signs": (powers[:, None] * a, b / powers, c, d),
        "between the sides": (a, -4 * b, c, d / np.float32(-4)),
        "sides": (c, d, a, b),
        "rows of zeros": (np.vstack([a, 0 * a[:1]]), np.hstack([b, b[:, :1]]), c, d),
    }
    for what, other in same.items():
        assert update_hash([("to_v", *pair(*other), 0.3)]) == known, what
    nudged = a.copy()
    nudged[1, 2] = np.nextafter(nudged[1, 2], np.float32(9))
    others = [(nudged, b, c, d), (a, b[:, order], c, d), (a, -b, c, d), (a, b, c, d[::-1])]
    assert len({known} | {update_hash([("to_v", *pair(*o), 0.3)]) for o in others}) == 5
    assert update_hash([("to_v", *pair(0 * a, b, c, d), 0.3)]) == update_hash([])


def test_a_small_one_has_the_hash_of_the_plain_product() -> None:
    down, up = pair(*sides())
    assert update_hash([("x", down, up, 0.5)]) == update_hash([("x", down.form(), up.form(), 0.5)])
