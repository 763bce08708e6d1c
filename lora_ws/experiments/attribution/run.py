"""Measure attribution in a stack of adapters: true ablation, and four shortcuts against it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_ws.attribution.ablation import Ablation, ablate
from lora_ws.attribution.activations import block_sensitivity, cache_safe_blocks
from lora_ws.attribution.agreement import agreement
from lora_ws.attribution.autoencoder import fit_autoencoder
from lora_ws.attribution.boxes import box_scores, renoise
from lora_ws.attribution.inversion import invert, pseudo_ablate
from lora_ws.attribution.report import save_pictures
from lora_ws.attribution.sparse import (
    code_r2,
    decomposition_rows,
    record_base,
    record_middle,
    superposition,
)
from lora_ws.attribution.trajectory import trajectory
from lora_ws.composition.testbed import bundled
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.experiments.attribution.report import BOX_METHODS, PICTURE, attribution_sections
from lora_ws.experiments.attribution.spec import (
    CACHED,
    ORIGINAL,
    STAGES,
    UNGUIDED,
    WAYS,
    AttributionRecord,
    AttributionSpec,
    Values,
)
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import Records
from lora_ws.report.page import write_report

# Seeds from here on are of images that nothing is measured on.
OTHERS = 1000


@dataclass(frozen=True, eq=False)
class _Setup:
    """What every stage reads."""

    spec: AttributionSpec
    pipeline: Any
    stack: AdapterStack

    @classmethod
    def of(cls, spec: AttributionSpec) -> "_Setup":
        testbed = bundled()
        members = {member.id: member for member in testbed.members}
        if unknown := [name for name in spec.adapters if name not in members]:
            raise ConfigError(f"adapters: expected {', '.join(members)}, got `{unknown[0]}`")
        files = [testbed.file(members[name]) for name in spec.adapters]
        stack = AdapterStack.of(files, spec.scales, spec.adapters)
        return cls(spec, load_pipeline(spec.base), stack)

    def drawings(self, stage: str) -> list[GenerationSpec]:
        return [self.drawing(prompt, seed) for prompt, seed in self.spec.drawn(stage)]

    def drawing(self, prompt: str, seed: int) -> GenerationSpec:
        return GenerationSpec(
            prompt,
            guidance_scale=self.spec.guidance,
            num_inference_steps=self.spec.steps,
            seed=seed,
        )

    def true(self, stage: str) -> list[Ablation]:
        """True ablations of the images of a stage."""
        return [self.ablated(drawing) for drawing in self.drawings(stage)]

    def ablated(self, drawing: GenerationSpec) -> Ablation:
        """True ablation of one image, made once."""
        if drawing not in self._known:
            self._known[drawing] = ablate(self.pipeline, self.stack, drawing)
        return self._known[drawing]

    @cached_property
    def _known(self) -> dict[GenerationSpec, Ablation]:
        return {}


def _ablation(setup: _Setup) -> Values:
    shares = torch.stack([one.shares for one in setup.true("ablation")]).numpy()
    first = [setup.stack.names[k] for k in shares.argmax(axis=1)]
    return {
        "shares": shares.mean(axis=0).tolist(),
        "spread": shares.std(axis=0, ddof=1).tolist(),
        "first": [first.count(name) for name in setup.stack.names],
    }


def _blocks(setup: _Setup) -> Values:
    k = len(setup.stack)
    # None, each alone, and all: none has no adapters, so that the base's own outputs count.
    rows = torch.cat([torch.zeros(1, k), torch.eye(k), torch.ones(1, k)])
    stack = setup.stack.scaled([setup.spec.block_scale] * k)
    found = [
        block_sensitivity(
            setup.pipeline,
            stack,
            setup.drawings("blocks"),
            rows * setup.spec.block_scale,
            forced=forced,
        )
        for forced in (True, False)
    ]
    safe = cache_safe_blocks(found[0])
    return {
        "blocks": list(found[0].blocks),
        "forced": found[0].variance.tolist(),
        "free": found[1].variance.tolist(),
        "all": found[0].change[-1].tolist(),
        "safe": list(safe.within),
    }


def _dictionary(setup: _Setup) -> tuple[Tensor, np.ndarray]:
    """Activations of the base on other images, and which image each is of."""
    spec = setup.spec
    prompts = tuple(f"a photo of {digit}" for digit in spec.digits) * spec.dictionary
    drawn = replace(
        setup.drawing("", OTHERS), prompt=prompts, num_inference_steps=spec.dictionary_steps
    )
    found = record_base(setup.pipeline, drawn, steps=range(0, spec.dictionary_steps, 2))
    return found.flatten(0, 1), np.arange(len(prompts)).repeat(found.shape[1])


def _sparse(setup: _Setup) -> Values:
    vectors, groups = _dictionary(setup)
    autoencoder = fit_autoencoder(vectors, groups=groups)
    drawings, stack = setup.drawings("sparse codes"), setup.stack.scaled(setup.spec.mixture)
    recording = record_middle(setup.pipeline, stack, drawings, decomposition_rows(stack.scales))
    raw = recording[:, :, setup.spec.steps // 2]
    outputs = {"codes": [autoencoder.encode(rows) for rows in raw], "activations": list(raw)}
    found = {name: [superposition(rows) for rows in parts] for name, parts in outputs.items()}

    def mean(values: list[np.ndarray]) -> list[list[float]]:
        return np.stack([np.mean(values, axis=0), np.std(values, axis=0, ddof=1)]).tolist()

    return {
        "vectors": len(vectors),
        "r2": autoencoder.held_out_r2,
        "code_r2": code_r2(recording, autoencoder),
        **{
            name: {
                "unit": mean([one.unit.least_squares for one in parts]),
                "own": mean([one.own.least_squares for one in parts]),
                "additivity": float(np.mean([one.additivity for one in parts])),
            }
            for name, parts in found.items()
        },
    }


def _boxes(setup: _Setup) -> Values:
    names, boxes = setup.stack.names, [setup.spec.boxes[name] for name in setup.stack.names]
    owners = [
        [
            int(one.maps[:, top:bottom, left:right].mean(dim=(1, 2)).argmax())
            for left, top, right, bottom in boxes
        ]
        for one in setup.true("boxes")
    ]
    probes = [
        renoise(setup.pipeline, setup.stack, drawing, levels=setup.spec.levels)
        for drawing in setup.drawings("boxes")
    ]
    found: Values = {
        "owners": [
            np.bincount(column, minlength=len(names)).tolist()
            for column in zip(*owners, strict=True)
        ]
    }
    for method in BOX_METHODS:
        scored = [
            box_scores(setup.pipeline.unet, setup.stack, probe, boxes, method=method)  # type: ignore[arg-type]
            for probe in probes
        ]
        top = np.array([one.scores.argmax(dim=1).tolist() for one in scored])
        found[method] = {
            "right": float(np.mean(top == np.array(owners))),
            "own": (top == np.arange(len(names))).mean(axis=0).tolist(),
            "shares": torch.stack([one.shares for one in scored]).mean(dim=0).tolist(),
        }
    return found


def _ways(setup: _Setup, drawing: GenerationSpec) -> dict[str, Tensor]:
    """Latents before each step of an image, as they were and as inversion finds them."""
    way = trajectory(setup.pipeline, setup.stack, drawing)
    last = setup.pipeline, setup.stack, drawing, way[-1]
    with warnings.catch_warnings():
        # That it does not lead back is what is measured.
        warnings.simplefilter("ignore", UserWarning)
        plain = invert(*last, guidance_scale=1, fixed_point_iters=0)
    back = invert(
        *last,
        guidance_scale=setup.spec.guidance,
        fixed_point_iters=setup.spec.fixed_point_iters,
    )
    return dict(zip(WAYS, (way, back, plain), strict=True))


def _inverted(setup: _Setup) -> Values:
    spec, true = setup.spec, setup.true("inversion")
    found: dict[tuple[str, int], list[Ablation]] = {}
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    for drawing, one in zip(setup.drawings("inversion"), true, strict=True):
        ways = _ways(setup, drawing)
        for name, latents in ways.items():
            noise = ways[CACHED][0]
            errors[name].append(float((latents[0] - noise).norm() / noise.norm()))
            for left in spec.left:
                start = spec.steps - left
                late = pseudo_ablate(setup.pipeline, setup.stack, drawing, latents, start=start)
                found.setdefault((name, left), []).append(late)
                if name == UNGUIDED:
                    # What the post compares with: the image itself, not as it is drawn again.
                    found.setdefault((ORIGINAL, left), []).append(replace(late, full=one.full))
    return {
        "errors": {name: float(np.mean(values)) for name, values in errors.items()},
        "rows": [[name, left, *agreement(late, true)] for (name, left), late in found.items()],
    }


MEASURES: dict[str, Callable[[_Setup], Values]] = dict(
    zip(STAGES, (_ablation, _blocks, _sparse, _boxes, _inverted), strict=True)
)


def run(spec: AttributionSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    records = Records(options.out, spec, AttributionRecord)
    setup = _Setup.of(spec)

    def measure(stage: str) -> AttributionRecord:
        return AttributionRecord(stage, MEASURES[stage](setup))

    done = records.complete(options.name, {stage: partial(measure, stage) for stage in STAGES})
    folder = options.out / "report"
    one = setup.ablated(setup.drawings("ablation")[spec.shown])
    save_pictures(one, folder / PICTURE)
    values = {stage: done[stage].values for stage in STAGES}
    write_report(folder, spec.title, attribution_sections(spec, values, folder))
    return folder
