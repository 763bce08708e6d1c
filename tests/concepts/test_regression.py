"""Scores from random ablations against gradients where both must agree, and on a real U-Net."""

from typing import Any

import numpy as np
import pytest
import torch
from denoisers import Linear, Sum, asking
from shapes import unchecked
from tolerances import EXACT, rounding

from lora_ws.concepts.objective import eligible_weights, erase_objective
from lora_ws.concepts.regression import components, regression
from lora_ws.concepts.scores import contributions, grouped
from lora_ws.errors import ConfigError

NAMES = [f"{part}.{k}.attentions.{n}.x" for part in ("down", "up") for k in (0, 1) for n in (0, 1)]


@pytest.fixture
def model() -> Linear:
    torch.manual_seed(0)
    return Linear([*NAMES, "down.0.attentions.0.y"])


@pytest.mark.parametrize("by", ["matrix", "block"])
@pytest.mark.parametrize("sign", [1, -1])
def test_on_a_linear_model_it_finds_what_gradients_say(by: Any, sign: int, model: Linear) -> None:
    objective, weights = asking(Sum, sign), eligible_weights(model)
    found = regression(objective, model, weights, by=by, masks=60, share=0.3)
    truth = grouped(contributions(objective, model, weights), by)
    assert list(found.scores) == list(truth)
    assert len(truth) == {"matrix": 9, "block": 8}[by]
    # Scores from gradients are kept in float32.
    bound = rounding(16, size=max(float(score.abs().max()) for score in truth.values()))
    for name, score in truth.items():
        assert found.scores[name] == pytest.approx(float(score), abs=bound)
    assert found.r2 == pytest.approx(1, abs=EXACT)


def test_least_squares_and_its_held_out_r2_are_numpys(model: Linear) -> None:
    """On a quadratic measure, which no linear model fits."""
    objective, weights = asking(), eligible_weights(model)
    found = regression(objective, model, weights, masks=80, share=0.3, folds=80)
    x = np.c_[np.ones(80), found.masks]
    fit = np.linalg.lstsq(x, found.falls, rcond=None)[0]
    assert list(found.scores.values()) == pytest.approx(fit[1:].tolist(), rel=EXACT)
    # With one mask left out at a time, errors follow from the hat matrix.
    left_out = (found.falls - x @ fit) / (1 - np.diag(x @ np.linalg.pinv(x)))
    r2 = 1 - np.square(left_out).sum() / np.square(found.falls - found.falls.mean()).sum()
    assert found.r2 == pytest.approx(r2, rel=EXACT)
    assert 0.3 < r2 < 0.999
    whole = objective.value(model)
    for name in np.array(list(weights))[found.masks[0]]:
        model.get_parameter(name).data.zero_()
    assert found.falls[0] == pytest.approx(whole - objective.value(model), rel=EXACT)


def test_a_ridge_shrinks_and_does_with_fewer_masks(model: Linear) -> None:
    objective, weights = asking(Sum), eligible_weights(model)
    few: dict[str, Any] = {"masks": 8, "folds": 4}
    found = [regression(objective, model, weights, ridge=r, **few) for r in (0.1, 1.0, 10.0)]
    sizes = [np.linalg.norm(list(one.scores.values())) for one in found]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.slow
def test_matrices_of_a_real_denoiser(pipeline: Any) -> None:
    objective = erase_objective(pipeline, "a photo of three", steps=5, stop_gradient=False)
    weights = eligible_weights(pipeline.unet)
    found = regression(objective, pipeline.unet, weights, masks=60)
    assert list(found.scores) == list(weights)
    assert np.isfinite(found.r2)
    # Measured: 0.89 with 100 masks of ten steps.
    assert found.r2 > 0.5
    again = regression(objective, pipeline.unet, weights, masks=60)
    assert again.scores == found.scores


def test_blocks_hold_their_matrices(pipeline: Any) -> None:
    weights = eligible_weights(pipeline.unet)
    blocks = components(weights, "block")
    assert sorted(name for names in blocks.values() for name in names) == sorted(weights)
    assert {len(names) for names in blocks.values()} == {2}
    assert all(name.startswith(block) for block, names in blocks.items() for name in names)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "component": ({"by": "row"}, "there is no component `row`"),
    "share": ({"share": 1.0}, "share: expected"),
    "too few masks": ({"masks": 9}, "tell 9 components apart, got 9"),
    "a share that takes nothing": ({"share": 1e-9}, "another share"),
    "folds": ({"folds": 1}, "folds: expected 2 to 200"),
    "more folds than masks": ({"folds": 11, "masks": 10}, "folds: expected 2 to 10"),
    "ridge": ({"ridge": -1.0}, "ridge: expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(wrong: str, model: Linear) -> None:
    how, text = WRONG[wrong]
    score, weights = unchecked(regression), eligible_weights(model)
    with pytest.raises(ConfigError, match=text):
        score(asking(Sum), model, weights, **({"folds": 5} | how))
