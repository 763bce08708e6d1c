"""What the paper on concept attribution states, beside what was found here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_ws.diffusion.digits import NAMES
from lora_ws.experiments.cad.spec import (
    BOTH,
    CAD,
    CONTRASTIVE,
    FIRST,
    NONE,
    CadSpec,
    Key,
)
from lora_ws.experiments.statements import Statement

Done = Mapping[Key, Mapping[str, Any]]
# Share of images up to which a digit counts as erased, and lost by others as preserved.
NEAR_ZERO, KEPT = 0.1, 0.9


def statements_of(spec: CadSpec, done: Done) -> list[Statement]:
    """All statements of the paper."""
    return [
        *_of_erasing(spec, done),
        *_of_weights(spec, done),
        *_of_prediction(spec, done),
        *OUT_OF_REACH,
    ]


OUT_OF_REACH = (
    Statement(
        "a linear model is trained for every parameter",
        "scores are of first order from one pass, as in the code that the authors released",
        "training one takes many evaluations per weight; `lora_ws.concepts.regression` trains "
        "them for whole matrices",
        None,
    ),
    Statement(
        "it finds concepts whose place is known (asked for as a first experiment)",
        "not measured",
        "no base is bundled of which the places are known",
        None,
    ),
    Statement(
        "it removes nudity more effectively than other methods",
        "not measured",
        "it needs Stable Diffusion, its weights and a detector, none of which is bundled",
        None,
    ),
    Statement(
        "it erases and amplifies better than the methods known before",
        "compared with random weights, the largest, and other scores alone",
        "the others are fine-tuned for hours on a GPU",
        None,
    ),
    Statement(
        "it works on larger models than Stable Diffusion's",
        "a U-Net of 16 x 16 pixels",
        "a larger one needs a GPU",
        None,
    ),
)


def shares_of(values: Mapping[str, Any], digit: str) -> tuple[float, list[float]]:
    """Share of images that show a digit, and of each of the others that show theirs."""
    shown = values["shown"]
    return shown[digit], [shown[name] for name in NAMES if name != digit]


def _of_erasing(spec: CadSpec, done: Done) -> list[Statement]:
    most, middle = max(spec.budgets), spec.shown_budget

    def at(method: str, budget: float) -> list[tuple[float, float]]:
        shares = (shares_of(done[Key("edit", d, method, budget)], d) for d in spec.digits)
        return [(own, float(np.mean(others))) for own, others in shares]

    def text(method: str, budget: float) -> str:
        pairs = ", ".join(f"{100 * own:.0f} / {100 * kept:.0f}" for own, kept in at(method, budget))
        return f"{method} at {100 * budget:g} %: {pairs}"

    names, every = ", ".join(spec.digits), at(CAD, most)
    kept = [k for method in (CAD, CONTRASTIVE) for _, k in at(method, middle)]
    asked = {
        wording: [
            done[Key("edit", d, CAD, most)]["wordings"][wording]
            / done[Key("edit", d, NONE)]["wordings"][wording]
            for d in spec.digits
        ]
        for wording in spec.wordings
    }
    worst = max(asked, key=lambda wording: max(asked[wording]))
    return [
        Statement(
            "objects are erased: accuracy near 0 %",
            f"{names} still shown / others shown, percent: {text(CAD, most)}; {text(BOTH, most)}",
            f"CAD leaves each in at most {100 * NEAR_ZERO:.0f} % of its images",
            all(own <= NEAR_ZERO for own, _ in every),
        ),
        Statement(
            "while other knowledge is preserved",
            f"{text(CAD, middle)}; {text(CONTRASTIVE, middle)}",
            f"others are shown in {100 * KEPT:.0f} % of their images at the least",
            min(kept) >= KEPT,
        ),
        Statement(
            "for concepts and images beyond those that are scored (asked for as a next check)",
            f"left of what the base shows by other wordings, {text(CAD, most)} by its own: at most "
            f"{100 * max(asked[worst]):.0f} %, by `{worst}`",
            "no wording brings back more than half of the images",
            max(asked[worst]) <= 0.5,
        ),
    ]


def _of_weights(spec: CadSpec, done: Done) -> list[Statement]:
    share = min(spec.concentrated, key=lambda one: abs(one - 0.05))
    place = spec.concentrated.index(share)
    held = [done[Key("scores", d)]["concentration"][CAD][place] for d in spec.digits]
    found = [done[Key("amplify", digit)] for digit in NAMES]
    rises = {
        name: np.array([one[name] - one[NONE] for one in found])
        for name in ("random", "largest", CAD)
    }
    texts = (
        f"{name} {100 * own.mean():+.0f} ± {100 * own.std(ddof=1) / len(own) ** 0.5:.0f}"
        for name, own in rises.items()
    )
    gain = rises[CAD] - np.maximum(rises["random"], rises["largest"])
    return [
        Statement(
            "knowledge is localised in a small number of parameters",
            f"the highest {100 * share:g} % of the weights hold "
            f"{', '.join(f'{100 * h:.0f}' for h in held)} % of the positive score",
            "they hold more than half",
            min(held) > 0.5,
        ),
        Statement(
            "some weights suppress a concept: without them it is drawn more",
            f"points of images that show the digit, {len(found)} digits: {', '.join(texts)}",
            "more than without random or the largest weights, by two standard errors",
            bool(gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5),
        ),
    ]


def _of_prediction(spec: CadSpec, done: Done) -> list[Statement]:
    scores = [done[Key("scores", digit)] for digit in spec.digits]

    def values(name: str, method: str) -> list[Any]:
        return [one[name][method] for one in scores]

    medians = {m: [100 * np.median(e) for e in values("errors", m)] for m in (CAD, FIRST)}
    edits = [done[Key("edit", d, CAD, spec.shown_budget)] for d in spec.digits]
    off = [abs(one["predicted"] - one["true"]) / abs(one["true"]) for one in edits]
    cheaper = [
        one["weights"] * one["value_seconds"] / max(one["scores_seconds"], 1e-3) for one in scores
    ]
    return [
        Statement(
            "scores are linear counterfactual predictors: correlation with the truth 0.506",
            f"{_two(values('correlation', CAD))}; {_two(values('correlation', FIRST))} with "
            "gradients through both predictions",
            "at least 0.5",
            min(values("correlation", CAD)) >= 0.5,
        ),
        Statement(
            "that sacrifice some precision",
            f"single weights are off by {_whole(medians[CAD])} % (median), by "
            f"{_whole(medians[FIRST])} % with gradients through both predictions",
            "off by less than half of the truth, as published",
            max(medians[CAD]) < 50,
        ),
        Statement(
            "and fail where many parameters act together",
            f"of whole edits of {100 * spec.shown_budget:g} % the prediction is off by "
            f"{_whole([100 * one for one in off])} % of the truth",
            "off by more than half",
            min(off) > 0.5,
        ),
        Statement(
            "but spare inference with every parameter changed: massive savings",
            f"{scores[0]['weights']} weights scored in {scores[0]['scores_seconds']:.1f} CPU "
            f"seconds, against {scores[0]['value_seconds']:.1f} for one of them: "
            f"{min(cheaper):,.0f} times less",
            "a thousand times less",
            min(cheaper) > 1000,
        ),
    ]


def _two(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _whole(values: list[Any]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)
