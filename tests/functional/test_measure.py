"""Adapters that are measured together: each as dense matrices and a hash written out say it is."""

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from tolerances import EXACT

from lora_ws.errors import ConfigError
from lora_ws.functional.kronecker import KroneckerProduct
from lora_ws.functional.measure import measure
from lora_ws.functional.update_modules import Factor, Module, formed

WIDTHS = {"down.attn1.to_q": (12, 9), "mid.attn2.to_v": (20, 16), "up.attn1.to_v": (7, 11)}
SIDE = 4


def adapter(seed: int, ranks: Sequence[int]) -> list[Module]:
    """Modules of several ranks, in an order of its own."""
    random = np.random.default_rng(seed)
    modules: list[Module] = []
    for rank, (name, (outputs, inputs)) in zip(ranks, WIDTHS.items(), strict=False):
        down = random.standard_normal((rank, inputs)).astype(np.float32)
        up = random.standard_normal((outputs, rank)).astype(np.float32)
        modules.append((name, down, up, float(random.uniform(-2, 2))))
    return [modules[k] for k in random.permutation(len(modules))]


def odd(seed: int) -> list[Module]:
    """Components of zeros, equal first numbers, zeros of both signs, numbers near the ends."""
    (name, down, up, scale), *rest = sorted(adapter(seed, [4, 3, 2]), key=lambda one: -len(one[1]))
    assert isinstance(down, np.ndarray)
    assert isinstance(up, np.ndarray)
    down[0] = 0
    down[1, :2] = down[2, :2] = -0.0
    down[1, 2] = down[2, 2]
    up[0] = 0
    return [(name, down * np.float32(1e-30), up * np.float32(1e30), scale), *rest]


def signs(text: str, width: int) -> np.ndarray:
    stream = hashlib.shake_256(f"lora_ws bilinear signs 1 {text}".encode())
    bits = "".join(f"{byte:08b}" for byte in stream.digest(-(-SIDE * width // 8)))
    return np.array([1.0 - 2 * int(bit) for bit in bits[: SIDE * width]]).reshape(SIDE, width)


def dense(down: Factor, up: Factor, scale: float) -> np.ndarray:
    return scale * formed(up).astype(float) @ formed(down).astype(float)


def sketched(modules: list[Module]) -> np.ndarray:
    total = np.zeros((SIDE, SIDE))
    for name, down, up, scale in modules:
        place = f"{name} {up.shape[0]}x{down.shape[1]}"
        write, read = signs(f"{place} write", up.shape[0]), signs(f"{place} read", down.shape[1])
        total += write @ dense(down, up, scale) @ read.T / SIDE
    return total.ravel()


def hashed(modules: list[Module]) -> str:
    """Number by number: rows of A are led by a positive one, their largest is in [0.5, 1)."""
    digest = hashlib.sha256()
    places = {
        f"{name} {up.shape[0]}x{down.shape[1]}": (down, up, s) for name, down, up, s in modules
    }
    for place, (down, up, scale) in sorted(places.items()):
        components = []
        for row, column in zip(formed(down).tolist(), formed(up).T, strict=True):
            written = (column * np.float32(scale)).tolist()
            if not any(row) or not any(written):
                continue
            shift = 2.0 ** -math.frexp(max(map(abs, row)))[1]
            shift = math.copysign(shift, next(number for number in row if number))
            numbers = [shift * n for n in row] + [n / shift for n in written]
            components.append(struct.pack(f"<{len(numbers)}d", *(n + 0.0 for n in numbers)))
        if components:
            digest.update(f"{place} {len(components)}\n".encode())
            for component in sorted(components):
                digest.update(component)
    return digest.hexdigest()


@pytest.mark.parametrize("fewest", [1, 2, 9])
@pytest.mark.parametrize("hashes", [True, False])
def test_each_of_many_is_measured_as_if_alone(
    fewest: int, hashes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_ws.functional.measure.FEWEST", fewest)
    ranks = ([1, 2, 3], [4, 4, 4], [4, 4, 4], [2, 16, 5], [9], [], [12, 20, 7])
    adapters = [adapter(seed, some) for seed, some in enumerate(ranks)] + [odd(seed=9)]
    found = measure(adapters, side=SIDE, hashes=hashes)
    for modules, one in zip(adapters, found, strict=True):
        norms = [np.linalg.norm(dense(*factors)) for _, *factors in modules]
        np.testing.assert_allclose(one.norms, norms, rtol=EXACT)
        expected = sketched(modules)
        size = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(one.sketch, expected, rtol=EXACT, atol=EXACT * size)
        assert one.hash == (hashed(modules) if hashes else "")


def test_kronecker_products_stand_beside_matrices_of_the_same_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_ws.functional.measure.FEWEST", 1)
    random = np.random.default_rng(0)
    down = KroneckerProduct(random.standard_normal((2, 4)), random.standard_normal((3, 5)))
    up = KroneckerProduct(random.standard_normal((3, 2)), random.standard_normal((4, 3)))
    plain: list[Module] = [("to_v", down.form(), up.form(), -0.5)]
    product, formed_one = measure([[("to_v", down, up, -0.5)], plain], side=SIDE)
    for one in (product, formed_one):
        np.testing.assert_allclose(one.norms, [np.linalg.norm(dense(*plain[0][1:]))], rtol=EXACT)
        np.testing.assert_allclose(one.sketch, sketched(plain), rtol=EXACT, atol=EXACT)
    assert product.hash != formed_one.hash


def test_what_is_no_module_is_refused_among_others() -> None:
    (name, down, up, scale), *_ = adapter(0, [3])
    with pytest.raises(ConfigError, match="got twice"):
        measure([adapter(0, [3]), [(name, down, up, scale)] * 2])
