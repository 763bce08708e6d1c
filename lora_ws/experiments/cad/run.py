"""Erase digits from a base model by every method, and judge what it still draws."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_ws.concepts.edit import SparseEdit, choose, magnitude_control, random_control
from lora_ws.concepts.objective import Objective, eligible_weights, erase_objective
from lora_ws.concepts.scores import contrast, contributions, validity
from lora_ws.diffusion.digits import NAMES, DigitJudge
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import generate, load_pipeline
from lora_ws.experiments.cad.report import cad_sections, shown_budget
from lora_ws.experiments.cad.spec import METHODS, CadRecord, CadSpec
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import Records
from lora_ws.report.images import save_grid
from lora_ws.report.page import write_report

SHOWN_IMAGES = 8


def run(spec: CadSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    pipeline, judge = load_pipeline(spec.base), DigitJudge.train()
    records = Records(options.out, spec, CadRecord)
    weights = eligible_weights(pipeline.unet)
    edits: dict[str, Edits] = {}
    correlations: dict[str, dict[str, float]] = {}
    for digit in spec.digits:
        edits[digit], correlations[digit] = _edits(spec, pipeline, weights, digit)
    jobs: dict[tuple[str, str, float], Callable[[], CadRecord]] = {
        (digit, *how): partial(_measure, spec, pipeline, judge, digit, how, edit)
        for digit, found in edits.items()
        for how, edit in found.items()
    }
    done = records.complete(options.name, jobs)
    folder = options.out / "report"
    for digit, found in edits.items():
        _pictures(spec, pipeline, digit, found, folder / f"{digit}.png")
    sections = cad_sections(spec, done, correlations, judge.accuracy, folder)
    write_report(folder, spec.title, sections)
    return folder


How = tuple[str, float]
Edits = dict[How, SparseEdit | None]


def _edits(
    spec: CadSpec, pipeline: Any, weights: Mapping[str, nn.Parameter], digit: str
) -> tuple[Edits, dict[str, float]]:
    def objective(name: str, stop_gradient: bool = True) -> Objective:
        how = {"steps": spec.steps, "guidance_scale": spec.guidance, "stop_gradient": stop_gradient}
        return erase_objective(pipeline, f"a photo of {name}", seeds=range(spec.seeds), **how)

    unet = pipeline.unet
    released, first = objective(digit), objective(digit, stop_gradient=False)
    cad, true = (contributions(o, unet, weights) for o in (released, first))
    others = [contributions(objective(n), unet, weights) for n in NAMES if n != digit]
    scores = {"CAD": cad, "CAD, true first order": true, "CAD, contrastive": contrast(cad, others)}
    found: Edits = {("none", 0.0): None}
    for budget in spec.budgets:
        for name, score in scores.items():
            found[name, budget] = choose(score, weights, budget, spec.per)
        edit = found["CAD", budget]
        assert edit is not None
        found["random", budget] = random_control(edit, weights, seed=0)
        found["largest", budget] = magnitude_control(edit, weights)
    pairs = {"CAD": (released, cad), "CAD, true first order": (first, true)}
    return found, {k: validity(o, unet, weights, s).correlation for k, (o, s) in pairs.items()}


def _measure(
    spec: CadSpec,
    pipeline: Any,
    judge: DigitJudge,
    digit: str,
    how: How,
    edit: SparseEdit | None,
) -> CadRecord:
    """Draw every digit with an edit, and judge the pictures."""
    prompts = tuple(f"a photo of {name}" for name in NAMES for _ in range(spec.images))
    with edit.applied(pipeline.unet) if edit else nullcontext():
        images = generate(pipeline, _generation(spec, prompts))
    truth = np.repeat(np.arange(len(NAMES)), spec.images)
    shares = (judge.digits(images) == truth).reshape(len(NAMES), -1).mean(axis=1)
    at = NAMES.index(digit)
    target, others = float(shares[at]), float(np.delete(shares, at).mean())
    return CadRecord(digit, *how, edit.changed if edit else 0, target, others)


def _generation(spec: CadSpec, prompt: str | tuple[str, ...]) -> GenerationSpec:
    return GenerationSpec(prompt, guidance_scale=spec.guidance, num_inference_steps=20)


def _pictures(spec: CadSpec, pipeline: Any, digit: str, edits: Edits, file: Path) -> None:
    kept = NAMES[(NAMES.index(digit) + 1) % len(NAMES)]
    budget = shown_budget(spec)
    rows, labels = [], []
    for name in (digit, kept):
        for method, share in (("none", 0.0), *((m, budget) for m in METHODS)):
            edit = edits[method, share]
            with edit.applied(pipeline.unet) if edit else nullcontext():
                generation = _generation(spec, f"a photo of {name}")
                rows.append(generate(pipeline, generation, images=SHOWN_IMAGES))
            labels.append(f"{name}: {method}")
    save_grid(torch.cat(rows), SHOWN_IMAGES, file, 4, labels)
