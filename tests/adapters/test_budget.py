"""Small files that stand for large updates: what they take, and that nothing else changes."""

import tracemalloc
from pathlib import Path

import fuzz_adapters
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tolerances import EXACT, rounding

from lora_ws.adapters import AdapterRef, LayerSpec, Layout, methods, read_adapter, structure
from lora_ws.adapters.adapter import ProductModule
from lora_ws.adapters.header import Limits
from lora_ws.adapters.projection import project_adapter
from lora_ws.adapters.reader import open_adapter
from lora_ws.adapters.summary import summarize
from lora_ws.audit.classify import classify_files
from lora_ws.audit.similar import adapter_modules
from lora_ws.errors import AdapterError
from lora_ws.functional.signs import Signs
from lora_ws.functional.sketch import METHOD, sketch

Shape = tuple[int, ...]
# Fused matrices whose thirds are whole blocks of the second side, and not; a plain one; factors.
CASES: dict[str, tuple[str, dict[str, Shape]]] = {
    "whole": ("lora_unet_mid_block_attentions_0_proj_in", {"w1": (4, 4), "w2": (6, 5)}),
    "queries, keys, values": (
        "lora_unet_double_blocks_0_img_attn_qkv",
        {"w1": (6, 4), "w2": (6, 3)},
    ),
    "blocks that cross": ("lora_unet_single_blocks_0_linear1", {"w1": (7, 4), "w2": (12, 3)}),
    "factors": (
        "lora_unet_single_blocks_0_linear2",
        {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 5)},
    ),
    "both in factors": (
        "lora_unet_single_blocks_0_linear2",
        {"w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (6, 2), "w2_b": (2, 5)},
    ),
    "a convolution": (
        "lora_unet_down_blocks_0_resnets_0_conv1",
        {"w1": (4, 4), "w2": (6, 5, 3, 3)},
    ),
}


def written(file: Path, *modules: tuple[str, dict[str, Shape]], method: str = "lokr") -> Path:
    random = np.random.default_rng(0)
    save_file(
        {
            f"{stem}.{method}_{role}": random.standard_normal(shape, dtype=np.float32) / 64
            for stem, shapes in modules
            for role, shape in shapes.items()
        },
        file,
    )
    return file


def form_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every product as it is; what was remembered of shapes is another answer."""
    monkeypatch.setattr(methods, "FORMED", 0)
    monkeypatch.setattr(structure, "_sorted_again", structure._sorted)


@pytest.mark.parametrize("case", CASES)
def test_a_product_that_is_not_formed_is_the_same_update(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "a.safetensors", CASES[case])
    formed = read_adapter(file).modules
    form_nothing(monkeypatch)
    with open_adapter(file) as opened:
        kept = opened.read()
        facts = summarize(opened, kept)
    assert all(isinstance(module, ProductModule) for module in kept.modules.values())
    assert list(kept.modules) == list(formed)
    error = rounding(64)
    for name, module in kept.modules.items():
        other = formed[name]
        assert (module.inputs, module.outputs, module.rank) == (
            other.inputs,
            other.outputs,
            other.rank,
        )
        dense = other.scale * other.up @ other.down
        np.testing.assert_allclose(
            module.scale * module.up @ module.down, dense, rtol=error, atol=error
        )
        assert facts.norms[name] == pytest.approx(np.linalg.norm(dense), rel=error)
    np.testing.assert_allclose(
        sketch(adapter_modules(kept)),
        sketch((m.name, m.down, m.up, m.scale) for m in formed.values()),
        atol=error,
    )


@pytest.mark.parametrize("core", [False, True])
def test_an_elementwise_product_that_is_not_formed_is_the_same_update(
    core: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1" if core else CASES["blocks that cross"][0]
    outer = (2, 28) if core else (28, 2)
    shapes = {"w1_a": outer, "w1_b": (2, 4), "w2_a": outer, "w2_b": (2, 4)}
    shapes |= {"t1": (2, 2, 3, 3), "t2": (2, 2, 3, 3)} if core else {}
    file = written(tmp_path / "a.safetensors", (stem, shapes), method="hada")
    formed = read_adapter(file).modules
    form_nothing(monkeypatch)
    for name, module in read_adapter(file).modules.items():
        assert isinstance(module, ProductModule)
        assert module.kernel == ((3, 3) if core else ())
        other = formed[name]
        assert not isinstance(other, ProductModule)
        error = rounding(64)
        np.testing.assert_allclose(module.down, other.down, rtol=error)
        np.testing.assert_allclose(module.up, other.up, rtol=error)


def test_a_file_of_a_large_elementwise_product_takes_what_its_own_numbers_take(
    tmp_path: Path,
) -> None:
    """Formed, its factors are ten million numbers, and their Gram matrices take seconds."""
    shapes = {"w1_a": (1536, 64), "w1_b": (64, 1024), "w2_a": (1536, 64), "w2_b": (64, 1024)}
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    file = written(tmp_path / "a.safetensors", (stem, shapes), method="hada")
    tracemalloc.start()
    try:
        finding = classify_files([AdapterRef.parse(file)])[0].finding
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert finding is not None
    assert finding.facts is not None
    one, a, other, b = (side.astype(float) for _, side in sorted(load_file(file).items()))
    assert finding.facts.norm == pytest.approx(np.linalg.norm((one @ a) * (other @ b)), rel=EXACT)
    assert peak < 40e6


@pytest.mark.parametrize("rank", [1, 4])
def test_it_is_cut_to_a_rank_without_being_formed(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "a.safetensors", CASES["whole"])
    (name, module), *_ = read_adapter(file).modules.items()
    layout = Layout.from_layers([LayerSpec(name, module.inputs, module.outputs, rank)])
    expected = project_adapter(read_adapter(file), layout)
    form_nothing(monkeypatch)
    monkeypatch.setattr(ProductModule, "_formed", None)
    found = project_adapter(read_adapter(file), layout)
    np.testing.assert_allclose(found.weights, expected.weights, atol=rounding(64))
    assert found.energy == pytest.approx(expected.energy, rel=rounding(64))


def test_a_file_of_large_products_takes_what_its_own_numbers_take(tmp_path: Path) -> None:
    """Formed, the factors of each of these modules are 75 million numbers."""
    sides = {"w1": (72, 48), "w2": (128, 64)}
    stems = [f"lora_unet_double_blocks_{k}_img_attn_qkv" for k in range(4)]
    file = written(tmp_path / "a.safetensors", *((stem, sides) for stem in stems))
    tracemalloc.start()
    try:
        finding = classify_files([AdapterRef.parse(file)])[0].finding
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert finding is not None
    assert finding.facts is not None
    assert finding.facts.modules == {"transformer": 12}
    # Signs of its widths, sixteen a number, as float64, and what einsum makes of them.
    assert peak < 64e6


def test_a_factor_that_is_asked_for_has_a_limit(tmp_path: Path) -> None:
    stem, _ = CASES["whole"]
    file = written(tmp_path / "a.safetensors", (stem, {"w1": (200, 200), "w2": (100, 100)}))
    (module,) = read_adapter(file).modules.values()
    with pytest.raises(AdapterError, match="a product of 400000000") as error:
        _ = module.up
    assert error.value.reason == "too-large"


@pytest.mark.parametrize(
    "limits", [Limits(factor_bytes=1000), Limits(cpu_seconds=1e-6)], ids=["bytes", "seconds"]
)
@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "full"])
def test_what_takes_too_much_is_refused_before_it_is_read(
    method: str, limits: Limits, tmp_path: Path
) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    shapes = {
        "lora": {"lora_down.weight": (4, 64), "lora_up.weight": (64, 4)},
        "loha": dict(zip(("hada_w1_a", "hada_w2_a"), [(64, 2)] * 2, strict=True))
        | dict(zip(("hada_w1_b", "hada_w2_b"), [(2, 64)] * 2, strict=True)),
        "lokr": {"lokr_w1": (8, 8), "lokr_w2": (8, 8)},
        "full": {"diff": (64, 64)},
    }[method]
    # Of values that would be refused too, had they been read.
    tensors = {f"{stem}.{role}": np.full(s, np.nan, np.float32) for role, s in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"at most .* CPU seconds; got \d+ bytes and") as error:
        open_adapter(tmp_path / "a.safetensors", limits=limits)
    assert error.value.reason == "too-large"


def test_signs_that_are_kept_are_few_and_the_same_again() -> None:
    signs = Signs(METHOD, most=1000)
    wide = signs.get("a", 16, 4096)
    first = [signs.get(f"{k}", 16, 20) for k in range(10)]
    assert signs.size <= 1000
    assert len(signs.kept) == 3
    again = [signs.get(f"{k}", 16, 20) for k in range(10)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(wide, signs.get("a", 16, 4096))
    assert set(np.unique(wide)) == {-1.0, 1.0}


@pytest.mark.parametrize("cases", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_spoilt_files_of_every_kind_are_findings(cases: int) -> None:
    reasons, _ = fuzz_adapters.run(cases, seed=cases)
    # Whole ones are among them, and many ways to be broken.
    assert reasons[""] > cases / 20
    assert len(reasons) > 6
