"""Turns that follow the change of the image."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from lora_ws.diffusion import AdaptiveSwitch, Switch
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import Step, acts_at
from lora_ws.diffusion.pipeline import denoise, initial_noise, load_pipeline
from lora_ws.errors import ConfigError


@pytest.mark.parametrize(("adapters", "turns"), [(1, 1), (2, 1), (3, 2), (4, 5)])
def test_equal_change_is_plain_turns(adapters: int, turns: int) -> None:
    steps = 20 * adapters * turns
    even, fixed = AdaptiveSwitch(turns, (1.0,) * steps), Switch(20)
    for number in range(steps):
        assert even.turn(Step(number, steps), adapters) == fixed.turn(number, adapters)


@pytest.mark.parametrize("steps", [7, 40])
def test_turns_move_equally_far(steps: int) -> None:
    change = np.random.default_rng(0).uniform(0.1, 3, size=7)
    turns = acts_at(AdaptiveSwitch(1, tuple(change)), 3, steps)
    assert sorted(step for own in turns for step in own) == list(range(steps))
    fine = np.repeat(change, 1000) / 1000
    way = np.concatenate([[0], np.cumsum(fine)]) / fine.sum()
    for place, own in enumerate(turns):
        for step in own:
            moved = way[round(step / steps * len(fine))]
            assert place / 3 - 1e-3 <= moved <= (place + 1) / 3 + 1e-3


def test_what_is_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match="expected what `fitted` measures"):
        AdaptiveSwitch().turn(Step(0, 4), 2)
    with pytest.raises(ConfigError, match=r"^turns: expected 1"):
        AdaptiveSwitch(0).check(2)
    with pytest.raises(ConfigError, match=r"^change: expected numbers"):
        AdaptiveSwitch(1, (0.0, 0.0)).check(2)


@pytest.mark.slow
def test_the_change_of_the_base_is_measured() -> None:
    pipeline = load_pipeline("digit-sd")
    generation = GenerationSpec("a photo of three", num_inference_steps=4, seed=5)
    moved = []
    for seed in (5, 11):
        latents = [initial_noise(pipeline, [seed])]
        latents += list(denoise(pipeline, latents[0], generation, seeds=[seed]))
        distances = (float(torch.linalg.vector_norm(b - a)) for a, b in pairwise(latents))
        moved.append([distance / np.sqrt(latents[0].numel()) for distance in distances])
    fitted = AdaptiveSwitch().fitted(pipeline, generation, [5, 11])
    assert fitted.change == pytest.approx(np.mean(moved, axis=0), rel=1e-5)
    # The seeds differ by more than the bound above at some step, so that both must count.
    assert abs(np.subtract(*moved)).max() > 1e-3
    assert fitted.fitted(pipeline, generation, [5]) is fitted
