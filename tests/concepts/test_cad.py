"""Contributions against true ablation, finite differences and brute force; edits bit by bit."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import Linear, Sum, asking
from scipy.stats import spearmanr
from shapes import unchecked
from tolerances import EXACT, rounding, terms_of
from torch import Tensor, nn

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.concepts.edit import SparseEdit, choose, magnitude_control, random_control
from lora_ws.concepts.objective import (
    Objective,
    amplify_objective,
    eligible_weights,
    erase_objective,
)
from lora_ws.concepts.scores import (
    adapter_scores,
    concentration,
    contrast,
    contributions,
    grouped,
    single_weight_errors,
    validity,
)
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.family import repeated
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import adapter_layout, generate
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError, DataError

THREE = GenerationSpec("a photo of three", num_inference_steps=4)
# Of central differences of a J that is summed in float32: steps must be so large that its rounding
# does not count, and what is left of its curvature then does. Set for that, not derived.
CURVED = 0.02


@pytest.fixture
def linear() -> tuple[Linear, Objective]:
    torch.manual_seed(0)
    return Linear(), asking(Sum)


@pytest.fixture(scope="module")
def objective(digit_sd: Any) -> Objective:
    return erase_objective(digit_sd, "a photo of three", steps=8, stop_gradient=False)


@pytest.fixture(scope="module")
def scores(digit_sd: Any, objective: Objective) -> dict[str, Tensor]:
    return contributions(objective, digit_sd.unet, eligible_weights(digit_sd.unet))


def test_on_a_linear_model_scores_are_true_ablations(linear: tuple[Linear, Objective]) -> None:
    model, objective = linear
    weights = eligible_weights(model)
    scores = contributions(objective, model, weights)["block.ff.weight"]
    whole = objective.value(model)
    for k in range(16):
        other = copy.deepcopy(model)
        other.block.ff.weight.data.view(-1)[k] = 0
        fall = whole - objective.value(other)
        # Scores are kept in float32.
        assert float(scores.flatten()[k]) == pytest.approx(fall, rel=rounding(4), abs=EXACT)
    held = {"block.ff.weight": scores}
    sums = {by: grouped(held, by)["block.ff.weight"] for by in ("row", "column", "matrix")}  # type: ignore[arg-type]
    bound = rounding(16, size=float(scores.abs().sum()))
    assert torch.allclose(sums["row"], scores.sum(1), rtol=0, atol=bound)
    assert torch.allclose(sums["column"], scores.sum(0), rtol=0, atol=bound)
    assert float(sums["matrix"]) == pytest.approx(whole, abs=bound)
    found = validity(objective, model, weights, held, share=0.3)
    assert found.correlation == pytest.approx(1)
    assert found.predicted == pytest.approx(found.true, abs=bound)


@pytest.mark.slow
def test_the_derivative_of_shrinking_all_is_the_sum_of_scores(
    pipeline: Any, objective: Objective, scores: dict[str, Tensor]
) -> None:
    weights = eligible_weights(pipeline.unet)
    held = {name: weight.detach().clone() for name, weight in weights.items()}
    total, changes = float(sum(score.sum() for score in scores.values())), []
    for size in (1e-2, -1e-2):
        for weight in weights.values():
            weight.data.mul_(1 - size)
        changes.append(objective.value(pipeline.unet))
        for name, weight in weights.items():
            weight.data.copy_(held[name])
    assert (changes[1] - changes[0]) / 2e-2 == pytest.approx(total, rel=CURVED)


@pytest.mark.slow
def test_scores_rank_single_weights_as_taking_them_away_does(
    pipeline: Any, objective: Objective, scores: dict[str, Tensor]
) -> None:
    name = max(scores, key=lambda key: float(scores[key].abs().max()))
    weight, flat = dict(pipeline.unet.named_parameters())[name], scores[name].flatten()
    places = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:50]
    whole, true = objective.value(pipeline.unet), []
    for place in places:
        kept = weight.data.view(-1)[place].clone()
        weight.data.view(-1)[place] = 0
        true.append(whole - objective.value(pipeline.unet))
        weight.data.view(-1)[place] = kept
    assert spearmanr(true, flat[places]).statistic > 0.7


def cancellation(pipeline: Any, objective: Objective) -> float:
    """How much larger predictions are than their difference, of which J is the square."""
    told = repeated(objective.told, len(objective.latents))
    with torch.no_grad():
        said = pipeline.unet(objective.latents, objective.times, **told).sample
    return float(said.norm()) / objective.value(pipeline.unet) ** 0.5


def gradient_bound(pipeline: Any, objective: Objective, grads: dict[str, Tensor]) -> float:
    """Absolute: forth and back through the U-Net, relative to the largest gradient."""
    largest = max(float(grad.abs().max()) for grad in grads.values())
    size = largest * cancellation(pipeline, objective)
    return rounding(2 * terms_of(pipeline.unet), size=size)


def test_as_released_the_other_prediction_is_a_constant(
    pipeline: Any, objective: Objective
) -> None:
    weights = eligible_weights(pipeline.unet)
    rows = range(len(objective.latents))
    with torch.no_grad():
        parts = [
            objective._predict(pipeline.unet, slice(k, k + 1), objective.against) for k in rows
        ]
    fixed = replace(objective, against=torch.cat(parts))
    released = replace(objective, stop_gradient=True).gradients(pipeline.unet, weights)
    grads, value = fixed.gradients(pipeline.unet, weights), objective.value(pipeline.unet)
    atol = gradient_bound(pipeline, objective, grads)
    for name, grad in grads.items():
        assert torch.allclose(released[name], grad, rtol=0, atol=atol)
    rel = 2 * rounding(terms_of(pipeline.unet)) * cancellation(pipeline, objective)
    assert fixed.value(pipeline.unet) == pytest.approx(value, rel=rel)


def test_signs_agree_between_the_objectives(pipeline: Any) -> None:
    images = generate(pipeline, THREE, images=2)
    loss = amplify_objective(pipeline, "a photo of three", images, steps=5)
    weights = eligible_weights(pipeline.unet)
    scores, grads = (
        contributions(loss, pipeline.unet, weights),
        loss.gradients(pipeline.unet, weights),
    )
    for name, weight in weights.items():
        expected = -weight * grads[name]
        atol = rounding(1, size=float(expected.abs().max()))
        assert torch.allclose(scores[name], expected, rtol=0, atol=atol)
    assert loss.sign == -1


@pytest.mark.parametrize(("which", "text"), [("ff", ".ff."), ("attention", ".attn")])
def test_eligible_weights_are_matrices_of_their_part(which: Any, text: str, pipeline: Any) -> None:
    found = eligible_weights(pipeline.unet, which)
    assert found
    assert all(text in name and weight.ndim == 2 for name, weight in found.items())
    assert set(found) < set(eligible_weights(pipeline.unet, "all"))


def numbers(*rows: list[float]) -> dict[str, Tensor]:
    return {"w": torch.tensor(rows)}


SCORED = numbers([5, -1, 3, 0], [-2, -3, -4, 1], [9, 8, 7, 6])
CHOICES = {
    ("row", 0.5): [0, 2, 7, 8, 9],
    ("matrix", 0.25): [8, 9, 10],
    ("global", 0.25): [8, 9, 10],
    ("matrix", 1.0): [0, 2, 7, 8, 9, 10, 11],
    ("row", 0.2): [],
}


@pytest.mark.parametrize(("per", "budget"), CHOICES)
def test_choices_are_the_best_positive_ones(per: Any, budget: float) -> None:
    edit = choose(SCORED, {"w": nn.Parameter(torch.ones(3, 4))}, budget, per)
    assert edit.indices.get("w", torch.tensor([])).tolist() == CHOICES[per, budget]
    assert edit.changed == len(CHOICES[per, budget])


def test_controls_change_as_many_of_each_matrix(pipeline: Any, scores: dict[str, Tensor]) -> None:
    weights = eligible_weights(pipeline.unet)
    edit = choose(scores, weights, 0.01)
    random, largest = random_control(edit, weights, 0), magnitude_control(edit, weights)
    for name, at in edit.indices.items():
        assert len(random.indices[name].unique()) == len(largest.indices[name].unique()) == len(at)
        flat = weights[name].detach().abs().flatten()
        assert flat[largest.indices[name]].min() >= flat.sort(descending=True).values[len(at)]
    same = random_control(edit, weights, 0)
    assert all(torch.equal(random.indices[k], same.indices[k]) for k in edit.indices)


def test_an_edit_is_undone_bit_by_bit_and_survives_its_file(
    pipeline: Any, scores: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = eligible_weights(pipeline.unet)
    edit = choose(scores, weights, 0.02, "global")
    plain = generate(pipeline, THREE)
    with edit.applied(pipeline.unet):
        changed = generate(pipeline, THREE)
        assert sum(int((weight == 0).sum()) for weight in weights.values()) == edit.changed
    assert (changed - plain).abs().max() > 0.01
    assert torch.equal(generate(pipeline, THREE), plain)
    again = SparseEdit.load(edit.save(tmp_path / "edit.safetensors"))
    other = copy.deepcopy(pipeline.unet)
    again.apply(other)
    with edit.applied(pipeline.unet):
        for one, two in zip(pipeline.unet.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
    with pytest.raises(ConfigError, match="same base, once"):
        again.apply(other)


def test_what_is_no_edit_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="expected an edit"):
        SparseEdit.load(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_first_order_predicts_small_random_edits(
    pipeline: Any, objective: Objective, scores: dict[str, Tensor]
) -> None:
    weights = eligible_weights(pipeline.unet)
    assert validity(objective, pipeline.unet, weights, scores).correlation > 0.9


def test_contrast_takes_off_what_others_need() -> None:
    others = [numbers([4.0, -4.0]), numbers([2.0, -1.0])]
    assert contrast(numbers([5.0, 5.0]), others)["w"].tolist() == [[2.0, 5.0]]
    with pytest.raises(ConfigError, match="at least one"):
        contrast(numbers([1.0]), [])


@pytest.mark.slow
def test_scores_of_ranks_sum_to_the_derivative_of_scales(
    pipeline: Any, objective: Objective
) -> None:
    convolution = LayerSpec("conv_in", 36, 32, 2)
    layout = Layout.from_layers([*adapter_layout(pipeline.unet, 2).layers, convolution])
    rows = 0.1 * torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
    stack = AdapterStack(("a", "b"), AdapterBank.from_rows(rows, layout), (0.8, 0.5))
    found = adapter_scores(objective, pipeline, stack)
    assert {scores.shape for scores in found.values()} == {(2, 2)}
    sums = torch.stack([scores.sum(1) for scores in found.values()]).sum(0)
    for k, scale in enumerate(stack.scales):
        changes = []
        for size in (1 - 3e-2, 1 + 3e-2):
            scales = torch.tensor([s * (size if n == k else 1) for n, s in enumerate(stack.scales)])
            with stack.bank.attach(pipeline.unet, scales):
                changes.append(objective.value(pipeline.unet))
        derivative = (changes[1] - changes[0]) / (6e-2 * scale)
        assert float(sums[k]) == pytest.approx(scale * derivative, rel=CURVED)


WRONG: dict[str, tuple[Any, str]] = {
    "concept": (lambda p: erase_objective(p, "a photo of tree"), "no `tree`"),
    "seeds": (lambda p: erase_objective(p, "three", seeds=()), "seeds: expected"),
    "eligible": (lambda p: unchecked(eligible_weights)(p.unet, "fff"), "did you mean `ff`"),
    "budget": (lambda p: choose({}, {}, 0), "budget: expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(wrong: str, pipeline: Any) -> None:
    call, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text):
        call(pipeline)


def test_scores_of_a_batch_are_those_of_its_rows(pipeline: Any, objective: Objective) -> None:
    """Gradients of a sum are sums of gradients, whatever is computed at once."""
    weights = eligible_weights(pipeline.unet)
    whole = objective.gradients(pipeline.unet, weights)
    totals = {name: np.zeros(weight.shape) for name, weight in weights.items()}
    for k in range(len(objective.latents)):
        rows = slice(k, k + 1)
        one = replace(objective, latents=objective.latents[rows], times=objective.times[rows])
        for name, grad in one.gradients(pipeline.unet, weights).items():
            totals[name] += grad.numpy()
    atol = gradient_bound(pipeline, objective, whole)
    for name, total in totals.items():
        assert np.allclose(whole[name], total, rtol=0, atol=atol)


def test_errors_of_single_weights_are_those_of_true_ablations(
    linear: tuple[Linear, Objective],
) -> None:
    model, objective = linear
    weights = eligible_weights(model)
    scores = contributions(objective, model, weights)
    twice = {name: 2 * score for name, score in scores.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    found = single_weight_errors(objective, model, weights, scores, {"own": scores, "2": twice}, 5)
    # On this model scores are true; scores that are twice as large are wrong by all of it.
    assert found["own"].shape == (5,)
    assert float(found["own"].max()) <= rounding(16, size=10)
    np.testing.assert_allclose(found["2"], 1, atol=rounding(16, size=10))
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())


def test_concentration_is_the_share_of_the_highest() -> None:
    rng = np.random.default_rng(0)
    parts = {name: rng.normal(size=(5, n)).astype(np.float32) for name, n in (("a", 7), ("b", 3))}
    joined = np.sort(np.concatenate([part.ravel() for part in parts.values()]))[::-1]
    positive = joined[joined > 0].sum()
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    shares = (0.02, 0.1, 0.3, 1.0)
    wanted = [joined[: int(share * 50)].clip(min=0).sum() / positive for share in shares]
    np.testing.assert_allclose(concentration(tensors, shares), wanted, rtol=rounding(50))
