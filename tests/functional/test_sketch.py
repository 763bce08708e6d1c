"""Sketches, hashes and overlap of updates, against dense matrices."""

import hashlib

import numpy as np
import pytest
from tolerances import EXACT, rounding

from lora_ws.errors import ConfigError
from lora_ws.functional.sketch import overlap, sketch, update_norm
from lora_ws.functional.update_hash import update_hash

WIDTHS = {"down.attn1.to_q": (12, 9), "mid.attn2.to_v": (20, 16), "up.attn1.to_v": (7, 11)}


def adapter(seed, rank=3, widths=WIDTHS, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [
        (
            name,
            rng.standard_normal((rank, inputs)).astype(dtype),
            rng.standard_normal((outputs, rank)).astype(dtype),
            0.75 + k,
        )
        for k, (name, (outputs, inputs)) in enumerate(widths.items())
    ]


def dense(modules):
    return {
        name: scale * up.astype(float) @ down.astype(float) for name, down, up, scale in modules
    }


def cosine(x, y):
    return np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))


def whole(modules, names):
    updates = dense(modules)
    return np.concatenate([updates[name].ravel() for name in names])


def split_anew(modules, seed=0):
    """The same update from other factors of a higher rank, the scale inside."""
    mixing = np.random.default_rng(seed).standard_normal((4, 4))
    return [
        (
            name,
            np.linalg.solve(mixing, np.vstack([down, np.zeros((1, down.shape[1]))])),
            scale * np.hstack([up, np.zeros((len(up), 1))]) @ mixing,
            1.0,
        )
        for name, down, up, scale in modules
    ]


def test_sketch_is_that_of_the_dense_update_under_signs_of_shake_256():
    (module,) = adapter(0, widths={"to_v": (5, 3)})
    sides = []
    for what, width in (("write", 5), ("read", 3)):
        text = f"lora_ws bilinear signs 1 to_v 5x3 {what}"
        stream = hashlib.shake_256(text.encode()).digest(-(-4 * width // 8))
        bits = "".join(f"{byte:08b}" for byte in stream)[: 4 * width]
        sides.append(np.array([1.0 - 2 * int(bit) for bit in bits]).reshape(4, width))
    expected = sides[0] @ dense([module])["to_v"] @ sides[1].T / 4
    np.testing.assert_allclose(sketch([module], side=4), expected.ravel(), rtol=EXACT, atol=EXACT)


def test_sketch_hangs_on_the_update_alone():
    modules = adapter(0)
    again = split_anew(modules)[::-1]
    np.testing.assert_allclose(sketch(again), sketch(modules), rtol=EXACT, atol=EXACT)


def test_sketch_is_linear_and_a_missing_module_is_an_update_of_zero():
    modules = adapter(0)
    parts = sum(sketch([module]) for module in modules)
    np.testing.assert_allclose(parts, sketch(modules), rtol=EXACT, atol=EXACT)
    doubled = [(name, down, 2 * up, scale) for name, down, up, scale in modules]
    np.testing.assert_allclose(sketch(doubled), 2 * sketch(modules), rtol=EXACT, atol=EXACT)
    assert not sketch([]).any()


def test_sketches_of_a_stack_are_those_of_its_adapters():
    ones = [adapter(seed) for seed in range(4)]
    stack = [
        (same[0][0], np.stack([m[1] for m in same]), np.stack([m[2] for m in same]), same[0][3])
        for same in zip(*ones, strict=True)
    ]
    np.testing.assert_allclose(sketch(stack), [sketch(one) for one in ones], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_cosine_of_sketches_is_unbiased_with_the_stated_variance(shared):
    rng = np.random.default_rng(1)
    side, errors = 8, []
    for draw in range(300):
        widths = {f"{draw}.{k}": (10, 12) for k in range(24)}
        a, own = (
            adapter(rng.integers(1 << 30), 2, widths),
            adapter(rng.integers(1 << 30), 2, widths),
        )
        b = [
            (n, np.vstack([da, do]), np.hstack([shared * ua, np.sqrt(1 - shared**2) * uo]), s)
            for (n, da, ua, s), (_, do, uo, _) in zip(a, own, strict=True)
        ]
        exact = cosine(whole(a, widths), whole(b, widths))
        errors.append(cosine(sketch(a, side), sketch(b, side)) - exact)
    stated = (1 - shared**2) / side
    assert abs(np.mean(errors)) < 4 * stated / np.sqrt(len(errors)) + 0.01
    assert 0.8 * stated < np.std(errors) < 1.4 * stated


def test_one_sided_agreement_of_one_module_fades_with_the_root_of_the_side():
    rng = np.random.default_rng(2)
    estimates = []
    for draw in range(400):
        read, (first, second) = rng.standard_normal((1, 30)), rng.standard_normal((2, 40, 1))
        second -= first * (first.T @ second) / (first.T @ first)
        pair = [sketch([(f"m{draw}", read, up, 1.0)]) for up in (first, second)]
        estimates.append(cosine(*pair))
    assert abs(np.mean(estimates)) < 0.05
    assert 0.8 / 4 < np.std(estimates) < 1.2 / 4


def test_factors_at_the_ends_of_float32_are_sketched():
    (name, down, up, _), *_ = adapter(0)
    large = sketch([(name, np.float32(1e37) * down, np.float32(1e-38) * up, 1.0)])
    expected = 0.1 * sketch([(name, down, up, 1.0)])
    # Below 1e-38 numbers are as far apart as eps at 1e-38.
    atol = rounding(down.size + len(up), size=np.abs(expected).max())
    np.testing.assert_allclose(large, expected, rtol=0, atol=atol)


def test_norm_is_that_of_the_dense_update():
    modules = adapter(0)
    expected = np.linalg.norm(whole(modules, WIDTHS))
    assert update_norm(modules) == pytest.approx(expected, rel=EXACT)
    assert update_norm([]) == 0


def test_hash_is_blind_to_what_changes_without_rounding():
    modules = adapter(0)
    modules[0][1][1, 3] = modules[0][2][2, 1] = 0
    expected = update_hash(modules)
    order = [2, 0, 1]
    signs = np.array([1, -1, -1], np.float32)
    powers = np.float32(2.0) ** np.array([-3, 0, 5], np.float32)
    spelt = [
        (
            name,
            (signs * powers)[:, None] * down[order],
            up[:, order] * (signs / powers) / np.float32(4),
            4 * scale,
        )
        for name, down, up, scale in modules
    ]
    assert update_hash(spelt[::-1]) == expected
    signed = [(n, down.copy(), up.copy(), scale) for n, down, up, scale in modules]
    signed[0][1][1, 3] = signed[0][2][2, 1] = -0.0
    assert update_hash(signed) == expected
    folded = [(n, down, up * np.float32(scale), 1.0) for n, down, up, scale in modules]
    assert update_hash(folded) == expected
    idle = ("idle", np.ones((1, 4), np.float32), np.zeros((5, 1), np.float32), 1.0)
    assert update_hash([*modules, idle]) == expected
    wider = [(n, a.astype(np.float64), b.astype(np.float64), s) for n, a, b, s in modules]
    assert update_hash(wider) == expected


def test_hash_tells_updates_apart():
    modules = adapter(0)
    (name, down, up, scale), *rest = modules
    nudged = down.copy()
    nudged[1, 2] = np.nextafter(nudged[1, 2], np.float32(9))
    others = [
        [(name, nudged, up, scale), *rest],
        [(name, down, up, -scale), *rest],
        [("other", down, up, scale), *rest],
        [(name, down, up[:, ::-1], scale), *rest],
        rest,
        [],
    ]
    hashes = {update_hash(other) for other in [modules, *others]}
    assert len(hashes) == len(others) + 1


def test_rounded_copies_have_another_hash_but_a_cosine_of_nearly_one():
    modules = adapter(0)
    half = [(n, a.astype(np.float16), b.astype(np.float16), s) for n, a, b, s in modules]
    assert update_hash(half) != update_hash(modules)
    # Each factor is off by up to half of eps, products by eps, and a cosine by half the square.
    assert 1 - cosine(sketch(half), sketch(modules)) < np.finfo(np.float16).eps ** 2 / 2


def test_overlap_is_that_of_dense_matrices():
    a, b = adapter(0), adapter(1, rank=5)
    b[1] = (*b[1][:3], -2.0)
    found, mine, others = overlap(a, b), dense(a), dense(b)
    assert found.names == tuple(WIDTHS)
    for k, name in enumerate(WIDTHS):
        x, y = mine[name], others[name]
        expected = [cosine(x, y), cosine(x @ x.T, y @ y.T), cosine(x.T @ x, y.T @ y)]
        measured = [found.cosine[k], found.left[k], found.right[k]]
        np.testing.assert_allclose(measured, expected, rtol=EXACT)
        np.testing.assert_allclose(found.norms[k], [np.linalg.norm(x), np.linalg.norm(y)])
    x, y = whole(a, WIDTHS), whole(b, WIDTHS)
    assert found.total[0] == pytest.approx(cosine(x, y))
    assert found.ratio == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x))


def test_overlap_of_one_update_under_other_factors_is_full():
    modules = adapter(0)
    found = overlap(modules, split_anew(modules))
    np.testing.assert_allclose(found.total, 1, rtol=EXACT)
    assert found.ratio == pytest.approx(1)


def test_modules_that_one_adapter_lacks_weigh_as_no_agreement():
    modules = adapter(0)
    found = overlap(modules, modules[:1])
    x = dense(modules)
    expected = np.linalg.norm(x["down.attn1.to_q"]) / np.linalg.norm(whole(modules, WIDTHS))
    np.testing.assert_allclose(found.total, expected)
    np.testing.assert_array_equal(found.cosine[1:], 0)
    np.testing.assert_array_equal(found.norms[1:, 1], 0)


def test_modules_of_one_name_and_other_widths_are_not_compared():
    a, b = adapter(0, widths={"to_v": (6, 5)}), adapter(0, widths={"to_v": (6, 4)})
    assert overlap(a, b).names == ("to_v", "to_v")
    assert overlap(a, b).total == (0, 0, 0)


def test_an_update_of_zero_resembles_nothing():
    modules = adapter(0)
    zero = [(name, down, up, 0.0) for name, down, up, _ in modules]
    assert overlap(modules, zero).total == (0, 0, 0)
    assert np.isnan(overlap(zero, modules).ratio)
    assert update_hash(zero) == update_hash([])


def test_what_is_no_module_is_refused():
    (name, down, up, scale), *_ = adapter(0)
    with pytest.raises(ConfigError, match=r"module `down\.attn1\.to_q`: expected A"):
        sketch([(name, down[:2], up, scale)])
    with pytest.raises(ConfigError, match="kernels of convolutions"):
        update_hash([(name, down[..., None, None], up[..., None, None], scale)])
    with pytest.raises(ConfigError, match="got twice"):
        update_norm([(name, down, up, scale)] * 2)
    with pytest.raises(ConfigError, match="expected A"):
        overlap([(name, down[None], up[None], scale)], [])
