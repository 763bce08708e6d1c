"""Integrated scores against closed forms, scipy's quadrature and what taking all away does."""

from typing import Any

import numpy as np
import pytest
import torch
from denoisers import Deep, Linear, asking
from scipy.integrate import quad_vec
from tolerances import EXACT, rounding
from torch import nn

from lora_ws.concepts.objective import (
    Objective,
    amplify_objective,
    eligible_weights,
    erase_objective,
    restored,
)
from lora_ws.concepts.scores import Scores, contributions, integrated
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import generate
from lora_ws.errors import ConfigError


def total(scores: Scores) -> float:
    return float(sum(score.sum() for score in scores.values()))


def what_all_do(objective: Objective, unet: nn.Module, weights: dict[str, nn.Parameter]) -> float:
    whole = objective.value(unet)
    with restored(weights):
        for weight in weights.values():
            weight.data.zero_()
        return objective.sign * (whole - objective.value(unet))


@pytest.mark.parametrize("sign", [1, -1])
def test_of_a_quadratic_they_sum_to_what_all_weights_do(sign: int) -> None:
    torch.manual_seed(0)
    model, objective = Linear(), asking(sign=sign)
    weights = eligible_weights(model)
    w = weights["block.ff.weight"].detach().double().numpy()
    z, y = (x.flatten(1).double().numpy() for x in (objective.latents, objective.against))
    effect = sign * (np.square(z @ w.T - y).sum() - np.square(y).sum())
    # The gradient is linear on the way, so that one point in the middle is enough.
    for points in (1, 3):  # scores are kept in float32
        found = integrated(objective, model, weights, points)
        assert total(found) == pytest.approx(effect, rel=rounding(16))
        grad = 2 * (z @ w.T / 2 - y).T @ z
        assert np.allclose(found["block.ff.weight"], sign * w * grad, rtol=rounding(8), atol=EXACT)
    assert abs(total(contributions(objective, model, weights)) - effect) > 0.1 * abs(effect)


def test_they_are_scipys_quadrature_of_gradients() -> None:
    torch.manual_seed(0)
    model, objective = Deep(), asking()
    weights = eligible_weights(model)
    one, two = (weight.detach().double().numpy() for weight in weights.values())
    z, y = (x.flatten(1).double().numpy() for x in (objective.latents, objective.against))

    def gradients(a: float) -> np.ndarray:
        error = 2 * (z @ (a * one).T @ (a * two).T - y)
        return np.stack([(error @ (a * two)).T @ z, error.T @ (z @ (a * one).T)])

    mean = quad_vec(gradients, 0, 1)[0]
    found = integrated(objective, model, weights, points=2)
    for score, weight, grad in zip(found.values(), (one, two), mean, strict=True):
        assert np.allclose(score, weight * grad, rtol=rounding(8), atol=EXACT)
    rough = integrated(objective, model, weights, points=1)
    assert not np.allclose(next(iter(rough.values())), one * mean[0], atol=1e-4)


@pytest.mark.slow
def test_of_a_real_denoiser_they_sum_to_what_all_weights_do(pipeline: Any) -> None:
    erase = erase_objective(pipeline, "a photo of three", steps=5, stop_gradient=False)
    generation = GenerationSpec("a photo of three", num_inference_steps=4)
    images = generate(pipeline, generation, images=2)
    weights = eligible_weights(pipeline.unet)
    for objective in (erase, amplify_objective(pipeline, "a photo of three", images, steps=5)):
        truth = what_all_do(objective, pipeline.unet, weights)
        found = total(integrated(objective, pipeline.unet, weights))
        # The quadrature's own error: a U-Net is no polynomial of its weights.
        assert found == pytest.approx(truth, rel=0.02)
        first = total(contributions(objective, pipeline.unet, weights))
        assert abs(first - truth) > abs(truth)


def test_points_are_counted() -> None:
    model = Linear()
    with pytest.raises(ConfigError, match="points: expected at least 1, got 0"):
        integrated(asking(), model, eligible_weights(model), 0)
