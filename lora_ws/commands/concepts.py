"""`lora-ws concepts erase` and `amplify`: find the weights that make a concept, and edit them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_ws.concepts.edit import Per, choose
from lora_ws.concepts.objective import (
    Eligible,
    amplify_objective,
    eligible_weights,
    erase_objective,
)
from lora_ws.concepts.report import outcomes, with_controls, write_edit
from lora_ws.concepts.scores import METHODS, Method, contrast, validity
from lora_ws.diffusion.pipeline import generate, load_pipeline
from lora_ws.diffusion.prompts import check_prompts
from lora_ws.errors import ConfigError


def erase(
    *,
    base: str,
    concept: str,
    preserve: list[str] | None = None,
    budget: float = 0.05,
    per: Per = "matrix",
    eligible: Eligible = "ff",
    scores: Method = "taylor",
    seeds: int = 3,
    steps: int = 50,
    guidance: float = 3.0,
    out: Path = Path("erased"),
) -> None:
    """Set the weights to zero that do most for a concept.

    Args:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub
        concept: prompt of what is to go, such as "a photo of three"
        preserve: prompts of what is to stay; weights that these need are spared
        budget: share of the weights
        per: of each row, of each matrix, or of all (global)
        eligible: ff, the feed-forward parts of transformer blocks; attention; or all
        scores: taylor, weight times gradient; or integrated, gradients averaged on the way from
            all of these weights off to all on
        seeds: trajectories that scores are from.
        steps: latents of each.
        guidance: scale of guidance on the way, and of the pictures.
        out: folder for the edit, its numbers, pictures and page.
    """
    pipeline = load_pipeline(base)
    keep = preserve or []
    check_prompts(pipeline, [concept, *keep])
    _check(seeds)

    how: dict[str, Any] = {"seeds": range(seeds), "steps": steps, "guidance": guidance}
    objective = partial(erase_objective, pipeline, **how)
    weights = eligible_weights(pipeline.unet, eligible)
    measured = objective(concept)
    score = METHODS[scores]
    own = score(measured, pipeline.unet, weights)
    others = [score(objective(prompt), pipeline.unet, weights) for prompt in keep]
    chosen = choose(contrast(own, others) if others else own, weights, budget, per)
    facts = {"erased": concept, "preserved": ", ".join(keep) or "nothing", "base": base}
    facts |= {"budget": f"{budget:g} of each {per}", "eligible": eligible, "scores": scores}
    edits = with_controls("erased", replace(chosen, facts=facts), weights)
    found = outcomes(edits, measured, pipeline.unet, own)
    valid = validity(measured, pipeline.unet, weights, own)
    page = write_edit(out, pipeline, edits, found, valid, [concept, *keep], guidance=guidance)
    Console(highlight=False, soft_wrap=True).print(f"{chosen.changed} weights set to 0\n{page}")


def amplify(
    *,
    base: str,
    concept: str,
    budget: float = 0.001,
    per: Per = "matrix",
    eligible: Eligible = "ff",
    scores: Method = "taylor",
    images: int = 16,
    steps: int = 50,
    guidance: float = 3.0,
    seed: int = 0,
    out: Path = Path("amplified"),
) -> None:
    """Set the weights to zero that work most against a concept, judged on images that it draws.

    Args:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub
        concept: prompt of what is to become stronger
        budget: share of the weights
        per: of each row, of each matrix, or of all (global)
        eligible: ff, the feed-forward parts of transformer blocks; attention; or all
        scores: taylor, weight times gradient; or integrated, gradients averaged on the way from
            all of these weights off to all on
        images: how many are drawn to judge by.
        steps: noise levels.
        guidance: scale of guidance of the images.
        seed: of the images and the noise.
        out: folder for the edit, its numbers, pictures and page.
    """
    pipeline = load_pipeline(base)
    check_prompts(pipeline, [concept])
    _check(images)
    weights = eligible_weights(pipeline.unet, eligible)
    drawn = generate(pipeline, [concept] * images, guidance, seed=seed)
    measured = amplify_objective(pipeline, concept, drawn, steps=steps, seed=seed)
    own = METHODS[scores](measured, pipeline.unet, weights)
    against = {name: -score for name, score in own.items()}
    chosen = choose(against, weights, budget, per)
    facts = {"amplified": concept, "base": base, "budget": f"{budget:g} of each {per}"}
    facts |= {"eligible": eligible, "scores": scores}
    edits = with_controls("amplified", replace(chosen, facts=facts), weights)
    found = outcomes(edits, measured, pipeline.unet, own)
    valid = validity(measured, pipeline.unet, weights, own)
    page = write_edit(out, pipeline, edits, found, valid, [concept], guidance=guidance)
    Console(highlight=False, soft_wrap=True).print(f"{chosen.changed} weights set to 0\n{page}")


def _check(count: int) -> None:
    if count < 1:
        raise ConfigError(f"seeds, images: expected at least 1, got {count}")
