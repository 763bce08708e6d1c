"""Ablation against images drawn one by one, and Shapley values against all orders."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, of_images, rounding
from torch import Tensor

from lora_ws.attribution.ablation import ablate, draw_subsets
from lora_ws.attribution.shapley import MOST_EXACT, exact, shapley, subsets_of
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import adapter_layout, generate, load_pipeline
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError, LayoutError

GENERATION = GenerationSpec("a photo of three", seed=5, num_inference_steps=6)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("digit-sd")


@pytest.fixture(scope="module")
def stack(pipeline: Any) -> AdapterStack:
    """Three adapters of random numbers; the last one is untrained and does nothing."""
    layout = adapter_layout(pipeline.unet, 2)
    rows = 0.3 * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0))
    for _, _, up in layout.pairs():
        rows[2, up] = 0
    return AdapterStack(
        ("ink", "dots", "nothing"), AdapterBank.from_rows(rows, layout), (0.8, 0.5, 1.0)
    )


def alone(pipeline: Any, stack: AdapterStack, scales: list[float]) -> Tensor:
    """By the pipeline itself, one image at a time."""
    with stack.bank.attach(pipeline.unet, torch.tensor(scales)):
        return generate(pipeline, GENERATION)[0]


def test_pictures_are_those_of_the_pipeline_one_by_one(pipeline: Any, stack: AdapterStack) -> None:
    found, bound = ablate(pipeline, stack, GENERATION), of_images(pipeline, 6, 3.0)
    first, second, third = stack.scales
    expected = {
        "full": alone(pipeline, stack, [first, second, third]),
        "base": alone(pipeline, stack, [0, 0, 0]),
        0: alone(pipeline, stack, [0, second, third]),
        1: alone(pipeline, stack, [first, 0, third]),
    }
    pairs = ((found.full, expected["full"]), (found.base, expected["base"]))
    pairs += tuple((found.leave_one_out[k], expected[k]) for k in (0, 1))
    for one, other in pairs:
        assert torch.allclose(one, other, atol=bound, rtol=0)
    effects = [float((expected[k] - expected["full"]).abs().mean()) for k in (0, 1)]
    assert found.effects[:2].tolist() == pytest.approx(effects, abs=bound)
    assert float(found.effects[2]) < bound
    assert float(found.shares.sum()) == pytest.approx(1, abs=rounding(3))
    assert not any(m._forward_hooks for m in pipeline.unet.modules())


@pytest.mark.slow
def test_batches_and_subsets_change_no_picture(pipeline: Any, stack: AdapterStack) -> None:
    rows = torch.from_numpy(subsets_of(3))
    whole = draw_subsets(pipeline, stack, GENERATION, rows)
    parts = draw_subsets(pipeline, stack, GENERATION, rows, batch=3)
    assert torch.allclose(whole, parts, atol=of_images(pipeline, 6, 3.0), rtol=0)


@pytest.mark.slow
def test_a_late_start_is_true_at_0_and_nothing_at_the_end(
    pipeline: Any, stack: AdapterStack
) -> None:
    true = ablate(pipeline, stack, GENERATION)
    effects = [float(ablate(pipeline, stack, GENERATION, start=k).effects[0]) for k in (1, 3, 5)]
    assert torch.equal(
        ablate(pipeline, stack, GENERATION, start=0).leave_one_out, true.leave_one_out
    )
    assert float(true.effects[0]) > effects[0] > effects[1] > effects[2] > 0
    late = ablate(pipeline, stack, GENERATION, start=5)
    assert torch.allclose(late.full, true.full, atol=of_images(pipeline, 6, 3.0), rtol=0)


WRONG: dict[str, tuple[Any, dict[str, int], type[Exception], str]] = {
    "start": (GENERATION, {"start": 6}, ConfigError, "from 0 to 5"),
    "batch": (GENERATION, {"batch": 0}, ConfigError, "batch: expected"),
    "long prompt": (
        GenerationSpec("three " * 20, num_inference_steps=2),
        {},
        ConfigError,
        "at most 10 tokens",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(wrong: str, pipeline: Any, stack: AdapterStack) -> None:
    generation, options, kind, text = WRONG[wrong]
    with pytest.raises(kind, match=text):
        ablate(pipeline, stack, generation, **options)


def test_another_base_is_refused(stack: AdapterStack) -> None:
    with pytest.raises(LayoutError, match="is this their base"):
        ablate(load_pipeline("tiny-sd"), stack, GENERATION)


def by_orders(worth: dict[frozenset[int], float], players: int) -> list[float]:
    """The definition: gains averaged over all orders."""
    gains = np.zeros(players)
    for order in permutations(range(players)):
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            gains[player] += worth[before | {player}] - worth[before]
    return list(gains / len(list(permutations(range(players)))))


@given(st.integers(1, 5), st.integers(0, 1000))
def test_exact_values_are_means_over_all_orders(players: int, seed: int) -> None:
    worths = np.random.default_rng(seed).standard_normal(2**players)
    table = {
        frozenset(np.flatnonzero(row).tolist()): float(worth)
        for row, worth in zip(subsets_of(players), worths, strict=True)
    }
    found = exact(worths)
    assert found == pytest.approx(by_orders(table, players))
    assert found.sum() == pytest.approx(worths[-1] - worths[0])


def test_sampled_values_are_near_and_know_how_near() -> None:
    weights = np.random.default_rng(0).uniform(0, 1, MOST_EXACT + 2)

    def worth(rows: np.ndarray) -> np.ndarray:
        return (rows @ weights) ** 2

    # Of the square of a sum, by the definition: w_i * sum of w.
    expected = weights * weights.sum()
    found = shapley(worth, len(weights), permutations=400)
    assert (np.abs(found.values - expected) < 4 * found.errors + EXACT).all()
    assert (found.errors > 0).all()
    assert found.values.sum() == pytest.approx(weights.sum() ** 2)
    assert found.subsets <= 2 ** len(weights)


def test_leaving_out_misses_what_two_do_alike_and_shapley_does_not() -> None:
    found = shapley(lambda rows: rows[:, :2].any(axis=1).astype(float), 3)
    assert found.values == pytest.approx([0.5, 0.5, 0])
    assert found.subsets == 8
