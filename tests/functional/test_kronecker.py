"""Kronecker products as factors against the matrices that they stand for."""

import numpy as np
import pytest
from tolerances import EXACT

from lora_ws.functional.factors import cut_to_rank
from lora_ws.functional.kronecker import KroneckerProduct, cut_kronecker, kronecker_norm
from lora_ws.functional.sketch import module_norms, overlap, sketch
from lora_ws.functional.update_hash import update_hash

ROWS = [(), (slice(0, 5),), (slice(3, 11),), (slice(8, 12), slice(1, 4))]


def pair(
    rows: tuple[slice, ...] = (), ranks: tuple[int, int] = (2, 3), seed: int = 0
) -> tuple[KroneckerProduct, KroneckerProduct]:
    """A and B of an update ``[12, 20]``, or of some of its rows."""
    random = np.random.default_rng(seed)
    first, second = ranks
    down = KroneckerProduct(random.standard_normal((first, 4)), random.standard_normal((second, 5)))
    up = KroneckerProduct(random.standard_normal((3, first)), random.standard_normal((4, second)))
    return down, up.take(rows)


@pytest.mark.parametrize("rows", ROWS)
def test_products_are_those_of_the_matrix(rows: tuple[slice, ...]) -> None:
    down, up = pair(rows)
    whole = np.einsum("ab,cd->acbd", up.first, up.second).reshape(12, 6)
    formed = np.concatenate([whole[part] for part in rows]) if rows else whole
    assert np.array_equal(up.form(), formed)
    assert up.shape == formed.shape
    random = np.random.default_rng(1)
    left, right = random.standard_normal((7, len(formed))), random.standard_normal((6, 7))
    np.testing.assert_allclose(left @ up, left @ formed, atol=EXACT)
    np.testing.assert_allclose(up @ right, formed @ right, atol=EXACT)
    norm = np.linalg.norm(formed @ down.form())
    assert kronecker_norm(down, up) == pytest.approx(norm, rel=EXACT)


@pytest.mark.parametrize("rows", ROWS)
def test_what_is_asked_of_an_update_is_as_of_its_factors(rows: tuple[slice, ...]) -> None:
    down, up = pair(rows)
    products = [("to_v", down, up, -0.5)]
    formed = [("to_v", down.form(), up.form(), -0.5)]
    np.testing.assert_allclose(sketch(products), sketch(formed), atol=EXACT)
    np.testing.assert_allclose(module_norms(products), module_norms(formed), rtol=EXACT)
    assert overlap(products, formed).total[0] == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (4, 5)])
def test_the_best_product_of_a_rank_is_that_of_the_matrix(
    rank: int, ranks: tuple[int, int]
) -> None:
    down, up = pair(ranks=ranks)
    cut, expected = cut_kronecker(down, up, rank), cut_to_rank(down.form(), up.form(), rank)
    assert cut.down.shape == expected.down.shape
    assert cut.up.shape == expected.up.shape
    np.testing.assert_allclose(cut.up @ cut.down, expected.up @ expected.down, atol=EXACT)
    np.testing.assert_allclose(np.abs(cut.down), np.abs(expected.down), atol=EXACT)
    assert cut.kept == pytest.approx(expected.kept, rel=EXACT)
    assert cut.whole == pytest.approx(expected.whole, rel=EXACT)


def test_the_hash_sees_through_what_is_free_and_nothing_else() -> None:
    down, up = (
        KroneckerProduct(product.first.astype(np.float32), product.second.astype(np.float32))
        for product in pair()
    )
    plain = update_hash([("to_v", down, up, 1.0)])
    order = [1, 0]
    same = [
        (
            KroneckerProduct(-2 * down.first, down.second),
            KroneckerProduct(up.first, -up.second / 2),
        ),
        (KroneckerProduct(4 * down.first, down.second), KroneckerProduct(up.first / 4, up.second)),
        (KroneckerProduct(down.first, 8 * down.second), KroneckerProduct(up.first / 8, up.second)),
        (
            KroneckerProduct(down.first[order], down.second),
            KroneckerProduct(up.first[:, order], up.second),
        ),
    ]
    for a, b in same:
        assert update_hash([("to_v", a, b, 1.0)]) == plain
    assert update_hash([("to_v", down, KroneckerProduct(2 * up.first, up.second), 0.5)]) == plain
    others = [
        update_hash([("to_v", down, KroneckerProduct(3 * up.first, up.second), 1.0)]),
        update_hash([("to_v", down, up, -1.0)]),
        update_hash([("to_v", down, up.take((slice(0, 12),)), 1.0)]),
        update_hash([("to_k", down, up, 1.0)]),
    ]
    assert len({plain, *others}) == 5


def test_a_side_of_zeros_is_no_update() -> None:
    down, up = pair()
    nothing = KroneckerProduct(0 * up.first, up.second)
    assert update_hash([("to_v", down, nothing, 1.0)]) == update_hash([])
    assert module_norms([("to_v", down, nothing, 1.0)]).tolist() == [0.0]
