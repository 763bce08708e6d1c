"""Merging against dense arithmetic and peft's merge functions on dense updates."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from tolerances import EXACT, rounding

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.adapters.adapter import Module
from lora_ws.adapters.merging import How, dare, merge_adapters, ties
from lora_ws.adapters.writer import write_adapter
from lora_ws.errors import AdapterError, ConfigError

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
SCALES = (0.8, -1.0, 0.5)
# Products of float32 factors: ranks of 6 and two scales; updates here stay below 20.
BOUND = rounding(6 + 2, size=20)


def module(seed: int, rank: int, name: str = NAME, inputs: int = 9, **more: object) -> Module:
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((rank, inputs)).astype(np.float32)
    up = rng.standard_normal((7, rank)).astype(np.float32)
    return Module("unet", name, "lora", down, up, 1.5, "test", **more)  # type: ignore[arg-type]


@pytest.fixture
def adapters() -> list[Adapter]:
    """Ranks 1, 2 and 3; the last adapts one more module."""
    made = [Adapter({NAME: module(k, k + 1)}, f"{k}.safetensors", "") for k in range(3)]
    made[2].modules[OTHER] = module(9, 2, OTHER)  # type: ignore[index]
    return made


def dense(found: Module) -> np.ndarray:
    return found.scale * found.up.astype(float) @ found.down.astype(float)


def expected(adapters: list[Adapter], name: str = NAME) -> np.ndarray:
    pairs = zip(adapters, SCALES, strict=True)
    return np.sum([s * dense(a.modules[name]) for a, s in pairs if name in a.modules], axis=0)


def test_a_linear_merge_is_the_sum_of_updates(adapters: list[Adapter]) -> None:
    merged, energy = merge_adapters(adapters, SCALES)
    assert energy == 1
    assert {name: m.rank for name, m in merged.modules.items()} == {NAME: 6, OTHER: 2}
    for name in (NAME, OTHER):
        assert np.allclose(dense(merged.modules[name]), expected(adapters, name), atol=BOUND)


def test_a_merge_of_lower_rank_is_the_best_of_it(adapters: list[Adapter]) -> None:
    merged, energy = merge_adapters(adapters, SCALES, rank=2)
    wanted, whole, kept = {}, 0.0, 0.0
    for name in (NAME, OTHER):
        left, values, right = np.linalg.svd(expected(adapters, name))
        wanted[name] = left[:, :2] * values[:2] @ right[:2]
        whole, kept = whole + (values**2).sum(), kept + (values[:2] ** 2).sum()
        assert np.allclose(dense(merged.modules[name]), wanted[name], atol=BOUND)
    assert energy == pytest.approx(kept / whole, rel=rounding(8))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_pefts_on_dense_updates(density: float) -> None:
    updates = np.random.default_rng(0).standard_normal((3, 7, 9))
    theirs = merge_utils.ties([torch.from_numpy(u) for u in updates], torch.ones(3), density)
    assert np.allclose(ties(updates, density), theirs.numpy(), atol=EXACT)


def test_ties_of_adapters_is_that_of_their_updates(adapters: list[Adapter]) -> None:
    merged, energy = merge_adapters(adapters, SCALES, "ties", rank=7, density=0.5)
    pairs = zip(adapters, SCALES, strict=True)
    updates = np.stack([s * dense(a.modules[NAME]) for a, s in pairs])
    assert np.allclose(dense(merged.modules[NAME]), ties(updates, 0.5), atol=BOUND)
    assert energy == pytest.approx(1, rel=rounding(8))


def test_dare_keeps_a_share_and_the_mean() -> None:
    updates = np.ones((2, 300, 300))
    found = dare(updates, 0.25, np.random.default_rng(0))
    # Five standard deviations of a mean, and of shares, of as many draws.
    assert found.mean() == pytest.approx(2, abs=5 * found.std() / found.size**0.5)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [0, 4, 8]
    off = 5 * (0.25 / found.size) ** 0.5
    assert counts / found.size == pytest.approx([0.5625, 0.375, 0.0625], abs=off)
    whole = dare(updates, 1.0, np.random.default_rng(0))
    assert (whole == 2).all()


def test_what_is_dropped_hangs_on_the_seed_alone(adapters: list[Adapter]) -> None:
    one, same, other = (
        dense(merge_adapters(adapters, SCALES, "dare", seed=seed).adapter.modules[NAME])
        for seed in (0, 0, 1)
    )
    assert (one == same).all()
    assert np.abs(one - other).max() > 0.1


def test_a_merged_adapter_is_a_file_like_any_other(adapters: list[Adapter], tmp_path: Path) -> None:
    merged = merge_adapters(adapters, SCALES).adapter
    again = read_adapter(write_adapter(merged, tmp_path / "out", "diffusers"))
    assert np.allclose(dense(again.modules[NAME]), expected(adapters), atol=BOUND)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3,), (1, 3, 3)])
@pytest.mark.parametrize("how", ["linear", "ties", "dare"])
def test_convolutions_merge_as_their_flat_matrices(
    how: How, kernel: tuple[int, ...], tmp_path: Path
) -> None:
    names = ("mid_block.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in")
    flat, conv = (
        [
            Adapter({n: module(k, k + 1, n, kernel=own) for n in names}, f"{k}.safetensors", "")
            for k in range(3)
        ]
        for own in ((), kernel)
    )
    rank = None if how == "linear" else 7
    plain, merged = (merge_adapters(x, SCALES, how, rank=rank).adapter for x in (flat, conv))
    again = read_adapter(write_adapter(merged, tmp_path / "out", "diffusers"))
    for name in names:
        assert again.modules[name].kernel == kernel
        expected_here = dense(plain.modules[name])
        assert np.allclose(dense(again.modules[name]), expected_here, atol=rounding(7, size=20))
        if how == "linear":
            assert np.allclose(expected_here, expected(conv, name), atol=BOUND)


def test_a_kernel_of_one_may_be_written_as_a_matrix() -> None:
    one, other = module(0, 1), module(1, 2, kernel=(1, 1))
    pair = [Adapter({NAME: m}, f"{m.rank}.safetensors", "") for m in (one, other)]
    merged = merge_adapters(pair, [0.6, 0.4]).adapter.modules[NAME]
    assert merged.kernel == (1, 1)
    assert np.allclose(dense(merged), 0.6 * dense(one) + 0.4 * dense(other), atol=BOUND)


def test_text_encoders_merge_too() -> None:
    made = []
    for k in range(3):
        m = replace(module(k, k + 1), component="text_encoder", path=TEXT)
        made.append(Adapter({m.name: m}, f"{k}.safetensors", ""))
    merged = merge_adapters(made, SCALES).adapter
    (name,) = merged.modules
    assert name == f"text_encoder.{TEXT}"
    assert np.allclose(dense(merged.modules[name]), expected(made, name), atol=BOUND)


def test_what_does_not_fit_is_named(adapters: list[Adapter]) -> None:
    with pytest.raises(ConfigError, match="scales: expected 3"):
        merge_adapters(adapters, [1.0])
    with pytest.raises(ConfigError, match="density"):
        merge_adapters(adapters, SCALES, "ties", density=0)
    foreign = Adapter({NAME: module(0, 1, inputs=5)}, "foreign.safetensors", "")
    with pytest.raises(AdapterError, match=r"foreign\.safetensors: .*other widths"):
        merge_adapters([adapters[0], foreign], [1, 1])
    kernels = [
        Adapter({NAME: module(0, 1, kernel=kernel)}, f"{kernel}.safetensors", "")
        for kernel in ((3, 3), (1, 9))
    ]
    with pytest.raises(AdapterError, match=r"\(1, 9\)\.safetensors: .*another kernel"):
        merge_adapters(kernels, [1, 1])
    dora = Adapter({NAME: module(0, 1, needs_base=True)}, "dora.safetensors", "")
    with pytest.raises(AdapterError, match="is of DoRA"):
        merge_adapters([dora], [1])
