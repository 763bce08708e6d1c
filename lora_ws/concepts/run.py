"""`erase` and `amplify`: find the weights that make a concept, edit them, and show what it did."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lora_ws.concepts.edit import choose
from lora_ws.concepts.objective import (
    Objective,
    amplify_objective,
    eligible_weights,
    erase_objective,
)
from lora_ws.concepts.report import outcomes, with_controls, write_edit
from lora_ws.concepts.scores import METHODS, Scores, contrast, validity
from lora_ws.concepts.spec import AmplifySpec, EditSpec, EraseSpec
from lora_ws.diffusion.families import denoiser_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import generate, load_base
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.errors import notice


class Edited(NamedTuple):
    """What was written.

    Attributes:
        changed: weights set to zero.
        page: beside the edit, its numbers and images.
    """

    changed: int
    page: Path


def erase(spec: EraseSpec) -> Edited:
    """Erase a concept by setting the weights to zero that support it and no preserved one.

    Raises:
        ConfigError: a prompt is too long, or the budget is no share.
    """
    pipeline, preserved = load_base(spec), spec.preserve or []
    beside = [name for name in spec.neighbours or [] if name not in preserved]
    shown = [spec.concept, *preserved, *beside]
    check_prompts(pipeline, shown)
    own, *others = (
        erase_objective(
            pipeline,
            prompt,
            seeds=range(spec.seeds),
            steps=spec.steps,
            guidance_scale=spec.guidance_scale,
            stop_gradient=spec.stop_gradient,
        )
        for prompt in (spec.concept, *preserved)
    )
    facts = {"erased": spec.concept, "preserved": ", ".join(preserved) or "nothing"}
    facts |= {"base": spec.base, "seeds": str(spec.seeds)}
    through = "one prediction, as published" if spec.stop_gradient else "both predictions"
    facts |= {"gradients": through}
    return _edit(spec, pipeline, own, others, facts, shown)


def amplify(spec: AmplifySpec) -> Edited:
    """Amplify a concept by setting the weights that work most against it to zero.

    Raises:
        ConfigError: the prompt is too long, or the budget is no share.
    """
    pipeline = load_base(spec)
    check_prompts(pipeline, [spec.concept])
    generation = GenerationSpec(spec.concept, guidance_scale=spec.guidance_scale, seed=spec.seed)
    drawn = generate(pipeline, generation, images=spec.images)
    own = amplify_objective(pipeline, spec.concept, drawn, steps=spec.steps, seed=spec.seed)
    facts = {"amplified": spec.concept, "base": spec.base, "seed": str(spec.seed)}
    return _edit(spec, pipeline, own, [], facts, [spec.concept])


def _edit(
    spec: EditSpec,
    pipeline: Any,
    own: Objective,
    others: Sequence[Objective],
    facts: dict[str, str],
    prompts: Sequence[str],
) -> Edited:
    """Edit the weights that do most for what an objective measures, and least for the others.

    An objective that shrinks with the concept is a training loss: there what works against it goes.
    """
    unet = denoiser_of(pipeline)
    weights = eligible_weights(unet, spec.eligible)

    def score(objective: Objective) -> Scores:
        return METHODS[spec.scores](objective, unet, weights)

    scores = score(own)
    wanted = contrast(scores, [score(other) for other in others]) if others else scores
    wanted = {name: own.sign * values for name, values in wanted.items()}
    chosen = choose(wanted, weights, spec.budget, spec.per)
    if not chosen.changed:
        notice(
            f"budget: {spec.budget:g} of each {spec.per} is less than one weight, or no weight "
            "scores above 0; nothing is changed"
        )
    facts |= {"budget": f"{spec.budget:g} of each {spec.per}", "eligible": spec.eligible}
    facts |= {"scores": spec.scores, "steps": str(spec.steps)}
    facts |= {"guidance scale": f"{spec.guidance_scale:g}"}
    facts |= {"scheduler": type(pipeline.scheduler).__name__}
    name, *_ = facts
    edits = with_controls(name, replace(chosen, facts=facts), weights)
    found = outcomes(edits, own, unet, scores)
    valid = validity(own, unet, weights, scores)
    page = write_edit(
        spec.out, pipeline, edits, found, valid, prompts, guidance_scale=spec.guidance_scale
    )
    return Edited(chosen.changed, page)
