"""Erase digits from a base model by every method, and judge what it still draws."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_ws.concepts.edit import SparseEdit, choose, magnitude_control, random_control
from lora_ws.concepts.objective import (
    Objective,
    amplify_objective,
    eligible_weights,
    erase_objective,
)
from lora_ws.concepts.scores import (
    Scores,
    concentration,
    contrast,
    contributions,
    integrated,
    single_weight_errors,
    validity,
)
from lora_ws.diffusion.digits import NAMES, DigitJudge
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import generate, load_pipeline
from lora_ws.experiments.cad.report import cad_sections
from lora_ws.experiments.cad.spec import (
    BOTH,
    CAD,
    CONTRASTIVE,
    FIRST,
    INTEGRATED,
    METHODS,
    NONE,
    SCORES,
    CadRecord,
    CadSpec,
    Key,
    says,
)
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import Records
from lora_ws.report.images import save_grid
from lora_ws.report.page import write_report

SHOWN_IMAGES = 8
Values = dict[str, Any]


def run(spec: CadSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    records = Records(options.out, spec, CadRecord)
    lab = _Lab(spec, load_pipeline(spec.base), DigitJudge.train())
    jobs: dict[Key, Callable[[], CadRecord]] = {}

    def job(key: Key, measure: Callable[[], Values]) -> None:
        jobs[key] = lambda: CadRecord(*key, values=measure())

    for digit in spec.digits:
        job(Key("scores", digit), partial(lab.scored, digit))
        for how in ((NONE, 0.0), *((m, b) for b in spec.budgets for m in METHODS)):
            job(Key("edit", digit, *how), partial(lab.edited, digit, *how))
    for digit in NAMES:
        job(Key("amplify", digit), partial(lab.amplified, digit))
    done = records.complete(options.name, jobs)
    folder = options.out / "report"
    for digit in spec.digits:
        lab.save_pictures(digit, folder / f"{digit}.png")
    values = {key: record.values for key, record in done.items()}
    sections = cad_sections(spec, values, lab.judge.accuracy, folder)
    write_report(folder, spec.title, sections)
    return folder


class _Lab:
    """A base, its scores for every digit, and what it draws with an edit."""

    def __init__(self, spec: CadSpec, pipeline: Any, judge: DigitJudge) -> None:
        self.spec, self.pipeline, self.judge = spec, pipeline, judge

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        return eligible_weights(self.pipeline.unet)

    @cached_property
    def _held(self) -> dict[Any, Any]:
        return {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is needed more than once, made when it first is."""
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def objective(self, digit: str, stop_gradient: bool = True) -> Objective:
        """What a digit is measured by."""
        spec = self.spec

        def make() -> Objective:
            return erase_objective(
                self.pipeline,
                says(spec.prompt, digit),
                seeds=range(spec.seeds),
                steps=spec.steps,
                guidance_scale=spec.guidance,
                stop_gradient=stop_gradient,
            )

        return self._once(("objective", digit, stop_gradient), make)

    def scores(self, digit: str, method: str) -> Scores:
        """Scores of all weights by a method."""
        if method in (CONTRASTIVE, BOTH):
            own = CAD if method == CONTRASTIVE else INTEGRATED
            others = [self.scores(name, own) for name in self.spec.others(digit)]
            return contrast(self.scores(digit, own), others)
        objective = self.objective(digit, stop_gradient=method != FIRST)
        what = objective, self.pipeline.unet, self.weights
        points = self.spec.points
        made = (
            partial(integrated, *what, points)
            if method == INTEGRATED
            else partial(contributions, *what)
        )
        return self._once((method, digit), made)

    def edit(self, digit: str, method: str, budget: float) -> SparseEdit | None:
        """The edit of a method; None for none."""
        if method == NONE:
            return None
        if method in ("random", "largest"):
            like = self.edit(digit, CAD, budget)
            assert like is not None
            control = partial(random_control, seed=0) if method == "random" else magnitude_control
            return control(like, self.weights)
        return choose(self.scores(digit, method), self.weights, budget, self.spec.per)

    def scored(self, digit: str) -> Values:
        """Scores against what happens when weights are set to 0, and what both take."""
        unet, found = self.pipeline.unet, {name: self.scores(digit, name) for name in SCORES}
        true = self.objective(digit, stop_gradient=False)
        what = true, unet, self.weights
        errors = single_weight_errors(*what, found[CAD], found, self.spec.singles)
        begun = time.process_time()
        contributions(self.objective(digit), unet, self.weights)
        scored = time.process_time()
        value = true.value(unet)
        ended = time.process_time()
        return {
            "correlation": {name: validity(*what, own).correlation for name, own in found.items()},
            "errors": {name: own.tolist() for name, own in errors.items()},
            "concentration": {
                name: concentration(own, self.spec.concentrated) for name, own in found.items()
            },
            "J": value,
            "weights": sum(weight.numel() for weight in self.weights.values()),
            "scores_seconds": round(scored - begun, 3),
            "value_seconds": round(ended - scored, 3),
        }

    def edited(self, digit: str, method: str, budget: float) -> Values:
        """Draw every digit with an edit, and the erased one by other wordings too."""
        spec, unet = self.spec, self.pipeline.unet
        edit, objective = self.edit(digit, method, budget), self.objective(digit)
        before = self._once(("J", digit), lambda: objective.value(unet))
        others, wordings = spec.others(digit), (spec.prompt, *spec.wordings)

        def neighbours() -> Tensor:
            return self.draw([says(spec.prompt, name) for name in others], spec.neighbours)

        plain = self._once(("plain", digit), neighbours)
        with edit.applied(unet) if edit else nullcontext():
            beside = neighbours()
            asked = self.draw([says(wording, digit) for wording in wordings], spec.images)
            after = objective.value(unet)
        own, *by_wording = self.judged(asked, [digit] * len(asked))
        by = self.scores(digit, method if method in SCORES else CAD)
        chosen = edit.indices.items() if edit else ()
        return {
            "changed": edit.changed if edit else 0,
            "shown": {digit: own, **dict(zip(others, self.judged(beside, others), strict=True))},
            "wordings": dict(zip(spec.wordings, by_wording, strict=True)),
            "moved": float((beside - plain).abs().mean()),
            "predicted": float(sum(by[name].flatten()[on].sum() for name, on in chosen)),
            "true": before - after,
        }

    def amplified(self, digit: str) -> Values:
        """Amplify what the base draws badly: share of images that show the digit, by edit."""
        spec, unet = self.spec, self.pipeline.unet
        prompt = says(spec.amplified, digit)
        images = self.draw([says(spec.prompt, digit)], spec.images)[0]
        loss = amplify_objective(self.pipeline, prompt, images, steps=spec.steps // 2)
        found = contributions(loss, unet, self.weights)
        # The loss falls as the digit is drawn better: what works against it has a negative score.
        against = {name: -score for name, score in found.items()}
        edit = choose(against, self.weights, spec.amplify_budget, "global")
        edits = {
            NONE: None,
            "random": random_control(edit, self.weights, seed=0),
            "largest": magnitude_control(edit, self.weights),
            CAD: edit,
        }
        shown = {}
        for name, one in edits.items():
            with one.applied(unet) if one else nullcontext():
                # Other noise than of the images behind the scores.
                drawn = self.draw([prompt], spec.images, seed=1000)
            (shown[name],) = self.judged(drawn, [digit])
        return shown

    def draw(self, prompts: list[str], images: int, seed: int = 0) -> Tensor:
        """Images ``[prompts, images, 3, height, width]``, the same noise for all prompts."""
        generation = self._generation(tuple(p for p in prompts for _ in range(images)))
        seeds = [seed + k for _ in prompts for k in range(images)]
        drawn = generate(self.pipeline, generation, seeds=seeds)
        return drawn.unflatten(0, (len(prompts), images))

    def judged(self, pictures: Tensor, digits: list[str]) -> list[float]:
        """Share of the images of each prompt that show its digit."""
        seen = self.judge.digits(pictures.flatten(0, 1)).reshape(pictures.shape[:2])
        right = np.array([NAMES.index(digit) for digit in digits])
        return (seen == right[:, None]).mean(axis=1).tolist()

    def _generation(self, prompt: str | tuple[str, ...]) -> GenerationSpec:
        return GenerationSpec(prompt, guidance_scale=self.spec.guidance, num_inference_steps=20)

    def save_pictures(self, digit: str, file: Path) -> None:
        """What is drawn of a digit and of the next one, before and after each edit."""
        spec = self.spec
        kept = NAMES[(NAMES.index(digit) + 1) % len(NAMES)]
        rows, labels = [], []
        for name in (digit, kept):
            for method, budget in ((NONE, 0.0), *((m, spec.shown_budget) for m in METHODS)):
                edit = self.edit(digit, method, budget)
                with edit.applied(self.pipeline.unet) if edit else nullcontext():
                    generation = self._generation(says(spec.prompt, name))
                    rows.append(generate(self.pipeline, generation, images=SHOWN_IMAGES))
                labels.append(f"{name}: {method}")
        save_grid(torch.cat(rows), SHOWN_IMAGES, file, 4, labels)
