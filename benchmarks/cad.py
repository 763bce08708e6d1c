"""What weights of a U-Net do for a concept: one pass with gradients against ablating each of them.

All matrices of the feed-forward parts are scored by J of `erase_objective`, 50 latents of one
trajectory, which is drawn before and not timed. Compared:

* ours: `contributions`, weight times gradient of J, which scores every weight, summed by matrix;
* ours, as CAD: the same with the other prompt's predictions taken for constants, the default;
* each matrix set to zero in turn, and J computed anew;
* each weight set to zero in turn: an estimate from 20 of them, drawn at random and timed, times
  their number over 20. None costs more than another, as all of J is computed anew.

Before, the first is checked by finite differences of J, to 1e-3 of the largest score of a matrix.
Scores are first order and ablation is not, so they do not do the same: how well scores predict what
ablation changes is printed. No goal: the ratio is the number of components over the values of J
that a pass with gradients costs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import common
import numpy as np
from torch import Tensor, nn

from lora_ws.concepts.objective import Objective, eligible_weights, erase_objective
from lora_ws.concepts.scores import Scores, contributions, grouped
from lora_ws.diffusion.pipeline import load_pipeline

PROMPTS = {"tiny-sd": "a photo of fish", "digit-sd": "a photo of three"}
CAD, MATRIX, WEIGHT = "ours, as CAD", "each matrix", "each weight (estimate)"
SAMPLE, SHRINK = 20, 0.01

Weights = Mapping[str, nn.Parameter]


def scaled(objective: Objective, unet: nn.Module, part: Tensor, by: float) -> float:
    """J with some numbers of a weight, a view of them, multiplied."""
    held = part.clone()
    part *= by
    try:
        return objective.value(unet)
    finally:
        part.copy_(held)


def by_matrix(objective: Objective, unet: nn.Module, weights: Weights) -> list[float]:
    """By how much J falls without each matrix."""
    whole = objective.value(unet)
    return [whole - scaled(objective, unet, weight.data, 0) for weight in weights.values()]


def by_weight(objective: Objective, unet: nn.Module, numbers: list[Tensor]) -> list[float]:
    """By how much J falls without each of some numbers."""
    whole = objective.value(unet)
    return [whole - scaled(objective, unet, number, 0) for number in numbers]


def check(objective: Objective, unet: nn.Module, weights: Weights, scores: Scores) -> None:
    """Compare scores of matrices with differences of J."""
    sums = [float(score) for score in grouped(scores, "matrix").values()]
    found = []
    for weight in weights.values():
        more = scaled(objective, unet, weight.data, 1 + SHRINK)
        found.append((more - scaled(objective, unet, weight.data, 1 - SHRINK)) / (2 * SHRINK))
    np.testing.assert_allclose(sums, found, rtol=0, atol=1e-3 * np.abs(found).max())


def drawn(weights: Weights, scores: Scores, seed: int) -> tuple[list[Tensor], list[float]]:
    """Numbers of the weights, views of one each, and their scores."""
    ends = np.cumsum([weight.numel() for weight in weights.values()])
    numbers, predicted = [], []
    for place in np.random.default_rng(seed).choice(ends[-1], SAMPLE, replace=False):
        n = int(np.searchsorted(ends, place, side="right"))
        weight, score = list(weights.values())[n], list(scores.values())[n]
        at = int(place - ends[n]) + weight.numel()
        numbers.append(weight.data.view(-1)[at : at + 1])
        predicted.append(float(score.flatten()[at]))
    return numbers, predicted


def times(cost: common.Cost, many: float) -> common.Cost:
    """What more of the same would take."""
    return common.Cost(cost.cpu * many, cost.wall * many)


def compare(base: str, steps: int, args: Any) -> None:
    """Check the scores, then time all ways."""
    pipeline = load_pipeline(base)
    unet, weights = pipeline.unet, eligible_weights(pipeline.unet)
    prompt, seeds = PROMPTS[base], [args.seed]
    exact = erase_objective(pipeline, prompt, seeds=seeds, steps=steps, stop_gradient=False)
    as_cad = replace(exact, stop_gradient=True)
    scores = contributions(exact, unet, weights)
    check(exact, unet, weights, scores)
    numbers, predicted = drawn(weights, scores, args.seed)
    total = sum(weight.numel() for weight in weights.values())

    def each_weight() -> common.Cost:
        cost = common.measure(lambda: by_weight(exact, unet, numbers))
        return times(cost, total / SAMPLE)

    costs = common.alternate(
        {
            common.OURS: common.timed(
                lambda: grouped(contributions(exact, unet, weights), "matrix")
            ),
            CAD: common.timed(lambda: grouped(contributions(as_cad, unet, weights), "matrix")),
            MATRIX: common.timed(lambda: by_matrix(exact, unet, weights)),
            WEIGHT: each_weight,
        },
        args.repeats,
    )
    title = f"CAD scores of {total:,} weights of {len(weights)} matrices, {base}"
    common.show(title, "s", costs, [common.Baseline(MATRIX), common.Baseline(WEIGHT)])
    sums = [float(score) for score in grouped(scores, "matrix").values()]
    of_matrices = np.corrcoef(sums, by_matrix(exact, unet, weights))[0, 1]
    of_weights = np.corrcoef(predicted, by_weight(exact, unet, numbers))[0, 1]
    print(
        "Correlation of scores with what ablation changes: "
        f"{of_matrices:.2f} for whole matrices, {of_weights:.2f} for {SAMPLE} single weights"
    )


def main() -> None:
    """Run and print."""
    args = common.arguments(__doc__, repeats=3)
    steps = 2 if args.quick else 50
    for base in list(PROMPTS)[args.quick :]:
        compare(base, steps, args)
    common.facts("diffusers", steps=steps, sample=SAMPLE, repeats=args.repeats)


if __name__ == "__main__":
    main()
