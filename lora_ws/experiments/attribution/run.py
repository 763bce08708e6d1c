"""Measure attribution in a stack of adapters: true ablation, and four shortcuts against it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_ws.attribution.ablation import Ablation, ablate
from lora_ws.attribution.activations import block_sensitivity, cache_safe_blocks
from lora_ws.attribution.agreement import agreement, late_start_curve
from lora_ws.attribution.autoencoder import fit_autoencoder
from lora_ws.attribution.boxes import box_scores, renoise
from lora_ws.attribution.inversion import invert, pseudo_ablate
from lora_ws.attribution.report import save_pictures
from lora_ws.attribution.sparse import (
    decompose_middle,
    decomposition_rows,
    latent_r2,
    record_middle,
)
from lora_ws.attribution.trajectory import trajectory
from lora_ws.composition.testbed import bundled
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.experiments.attribution.report import BOX_METHODS, PICTURE, attribution_sections
from lora_ws.experiments.attribution.spec import AttributionRecord, AttributionSpec, Values
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import Records
from lora_ws.report.page import write_report

# Of noise, that gradients are averaged over.
LEVELS = 8


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
        scales = [spec.scale] * len(files)
        return cls(spec, load_pipeline(spec.base), AdapterStack.of(files, scales, spec.adapters))

    @cached_property
    def drawings(self) -> list[GenerationSpec]:
        spec = self.spec
        return [
            GenerationSpec(
                prompt,
                guidance_scale=spec.guidance,
                num_inference_steps=spec.steps,
                seed=seed,
            )
            for prompt, seed in spec.pictures
        ]

    @cached_property
    def true(self) -> list[Ablation]:
        return [ablate(self.pipeline, self.stack, drawing) for drawing in self.drawings]


def _ablation(setup: _Setup) -> Values:
    shares = torch.stack([one.shares for one in setup.true]).numpy()
    first = [setup.stack.names[k] for k in shares.argmax(axis=1)]
    return {
        "shares": shares.mean(axis=0).tolist(),
        "spread": shares.std(axis=0, ddof=1).tolist(),
        "first": [first.count(name) for name in setup.stack.names],
    }


def _late(setup: _Setup) -> Values:
    spec = setup.spec
    curve = late_start_curve(
        setup.pipeline, setup.stack, setup.drawings, spec.starts, true=setup.true
    )
    return {"rows": [[row.start, row.cost, *row.agreement] for row in curve]}


def _blocks(setup: _Setup) -> Values:
    rows = torch.cat([torch.eye(len(setup.stack)), torch.ones(1, len(setup.stack))])
    found = [
        block_sensitivity(
            setup.pipeline,
            setup.stack,
            setup.drawings[: len(setup.spec.digits)],
            rows * setup.spec.scale,
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


def _sparse(setup: _Setup) -> Values:
    stack = setup.stack.scaled(setup.spec.mixture)
    rows = decomposition_rows(stack.scales)
    recording = record_middle(setup.pipeline, stack, setup.drawings, rows)
    vectors, groups = recording.vectors()
    autoencoder = fit_autoencoder(vectors, groups=groups)
    found = [
        decompose_middle(setup.pipeline, stack, drawing, autoencoder) for drawing in setup.drawings
    ]

    def mean(of: Callable[[Any], Any]) -> list[float]:
        values = np.array([of(one) for one in found])
        return np.stack([values.mean(axis=0), values.std(axis=0, ddof=1)]).tolist()

    parts = {"codes": lambda one: one.codes, "activations": lambda one: one.raw}
    return {
        "vectors": len(vectors),
        "r2": autoencoder.held_out_r2,
        "latent_r2": latent_r2(recording),
        **{
            name: {
                "unit": mean(lambda one, of=of: of(one).unit.least_squares),
                "own": mean(lambda one, of=of: of(one).own.least_squares),
                "additivity": mean(lambda one, of=of: of(one).additivity)[0],
            }
            for name, of in parts.items()
        },
    }


def _boxes(setup: _Setup) -> Values:
    boxes, names = setup.spec.boxes, setup.stack.names
    owners = [
        [
            names[int(one.maps[:, top:bottom, left:right].mean(dim=(1, 2)).argmax())]
            for left, top, right, bottom in boxes
        ]
        for one in setup.true
    ]
    levels = min(LEVELS, setup.spec.steps)
    probes = [
        renoise(setup.pipeline, setup.stack, drawing, levels=levels) for drawing in setup.drawings
    ]
    columns = zip(*owners, strict=True)
    found: Values = {"owners": [[column.count(name) for name in names] for column in columns]}
    for method in BOX_METHODS:
        scored = [
            box_scores(setup.pipeline.unet, setup.stack, probe, boxes, method=method)  # type: ignore[arg-type]
            for probe in probes
        ]
        right = [np.equal(one.top, own) for one, own in zip(scored, owners, strict=True)]
        shares = torch.stack([one.shares for one in scored]).mean(dim=0)
        found[method] = {"right": float(np.mean(right)), "shares": shares.tolist()}
    return found


def _inverted(setup: _Setup) -> Values:
    spec = setup.spec
    rows: dict[str, list[Ablation]] = {}
    errors = []
    for drawing in setup.drawings:
        way = trajectory(setup.pipeline, setup.stack, drawing)
        back = invert(
            setup.pipeline,
            setup.stack,
            drawing,
            way[-1],
            guidance_scale=spec.guidance,
            fixed_point_iters=spec.fixed_point_iters,
        )
        errors.append(float((back[0] - way[0]).norm() / way[0].norm()))
        for name, latents in (("cached", way), ("inverted", back)):
            for start in (0, spec.resume):
                one = pseudo_ablate(setup.pipeline, setup.stack, drawing, latents, start=start)
                rows.setdefault(f"{name}, from step {start}", []).append(one)
    return {
        "iterations": spec.fixed_point_iters,
        "noise_error": float(np.mean(errors)),
        "rows": {name: list(agreement(found, setup.true)) for name, found in rows.items()},
    }


STAGES: dict[str, Callable[[_Setup], Values]] = {
    "ablation": _ablation,
    "late start": _late,
    "blocks": _blocks,
    "sparse codes": _sparse,
    "boxes": _boxes,
    "inversion": _inverted,
}


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
        return AttributionRecord(stage, STAGES[stage](setup))

    done = records.complete(options.name, {stage: partial(measure, stage) for stage in STAGES})
    folder = options.out / "report"
    one = ablate(setup.pipeline, setup.stack, setup.drawings[spec.shown])
    save_pictures(one, folder / PICTURE)
    values = {stage: done[stage].values for stage in STAGES}
    write_report(folder, spec.title, attribution_sections(spec, values, folder))
    return folder
