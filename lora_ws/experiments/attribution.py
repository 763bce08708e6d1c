"""Attribution in a stack of adapters: true ablation, and what four shortcuts make of the same."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_ws.attribution.ablation import Ablation, Drawing, ablate
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
from lora_ws.diffusion.digits import check_digits
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError
from lora_ws.experiments.attribution_report import BOX_METHODS, sections
from lora_ws.experiments.quoted import PublishedTable, published_section
from lora_ws.experiments.records import Records
from lora_ws.report.page import Figure, Section, write_report
from lora_ws.report.progress import progress

# Of noise, that gradients are averaged over.
LEVELS = 8
Values = dict[str, Any]


@dataclass(frozen=True)
class AttributionSpec:
    """An experiment on adapters of the bundled testbed.

    Attributes:
        title: of the report.
        source: of the published numbers.
        base: of the adapters.
        adapters: that are stacked.
        scale: of each.
        mixture: other scales, which sparse codes are to recover.
        digits: that are drawn, by name.
        seeds: pictures of each digit.
        steps: of denoising.
        guidance: its scale.
        starts: shares of the steps before adapters are left out.
        resume: step that pseudo-ablation resumes at.
        fixed_point_iters: of inversion.
        boxes: left, top, right, bottom in pixels.
        published: numbers of others.
    """

    title: str
    source: str
    base: str
    adapters: tuple[str, ...]
    scale: float
    mixture: tuple[float, ...]
    digits: tuple[str, ...]
    seeds: int
    steps: int
    guidance: float
    starts: tuple[float, ...]
    resume: int
    fixed_point_iters: int
    boxes: tuple[tuple[int, int, int, int], ...]
    published: tuple[PublishedTable, ...]

    def __post_init__(self) -> None:
        check_digits(self.digits)
        if len(self.mixture) != len(self.adapters):
            raise ConfigError(
                f"mixture: expected {len(self.adapters)} scales, got {len(self.mixture)}"
            )


@dataclass(frozen=True)
class AttributionRecord:
    """What one part of the experiment found.

    Attributes:
        stage: one of `STAGES`.
        values: its numbers.
    """

    stage: str
    values: Values


@dataclass(frozen=True, eq=False)
class _Bench:
    """What all stages share."""

    spec: AttributionSpec
    pipeline: Any
    stack: AdapterStack

    @classmethod
    def of(cls, spec: AttributionSpec) -> "_Bench":
        testbed = bundled()
        members = {member.id: member for member in testbed.members}
        if unknown := [name for name in spec.adapters if name not in members]:
            raise ConfigError(f"adapters: expected {', '.join(members)}, got `{unknown[0]}`")
        files = [testbed.file(members[name]) for name in spec.adapters]
        scales = [spec.scale] * len(files)
        return cls(spec, load_pipeline(spec.base), AdapterStack.of(files, scales, spec.adapters))

    @cached_property
    def drawings(self) -> list[Drawing]:
        spec = self.spec
        return [
            Drawing(f"a photo of {digit}", "", seed, spec.steps, spec.guidance)
            for seed, digit in product(range(spec.seeds), spec.digits)
        ]

    @cached_property
    def true(self) -> list[Ablation]:
        return [ablate(self.pipeline, self.stack, drawing) for drawing in self.drawings]


def _ablation(bench: _Bench) -> Values:
    shares = torch.stack([one.shares for one in bench.true]).numpy()
    first = [bench.stack.names[k] for k in shares.argmax(axis=1)]
    return {
        "shares": shares.mean(axis=0).tolist(),
        "spread": shares.std(axis=0, ddof=1).tolist(),
        "first": [first.count(name) for name in bench.stack.names],
    }


def _late(bench: _Bench) -> Values:
    spec = bench.spec
    curve = late_start_curve(
        bench.pipeline, bench.stack, bench.drawings, spec.starts, true=bench.true
    )
    return {"rows": [[row.start, row.cost, *row.agreement] for row in curve]}


def _blocks(bench: _Bench) -> Values:
    rows = torch.cat([torch.eye(len(bench.stack)), torch.ones(1, len(bench.stack))])
    found = [
        block_sensitivity(
            bench.pipeline,
            bench.stack,
            bench.drawings[: len(bench.spec.digits)],
            rows * bench.spec.scale,
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


def _sparse(bench: _Bench) -> Values:
    stack = bench.stack.scaled(bench.spec.mixture)
    rows = decomposition_rows(stack.scales)
    recording = record_middle(bench.pipeline, stack, bench.drawings, rows)
    vectors, groups = recording.vectors()
    autoencoder = fit_autoencoder(vectors, groups=groups)
    found = [
        decompose_middle(bench.pipeline, stack, drawing, autoencoder) for drawing in bench.drawings
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


def _boxes(bench: _Bench) -> Values:
    boxes, names = bench.spec.boxes, bench.stack.names
    owners = [
        [
            names[int(one.maps[:, top:bottom, left:right].mean(dim=(1, 2)).argmax())]
            for left, top, right, bottom in boxes
        ]
        for one in bench.true
    ]
    levels = min(LEVELS, bench.spec.steps)
    probes = [
        renoise(bench.pipeline, bench.stack, drawing, levels=levels) for drawing in bench.drawings
    ]
    columns = zip(*owners, strict=True)
    found: Values = {"owners": [[column.count(name) for name in names] for column in columns]}
    for method in BOX_METHODS:
        scored = [
            box_scores(bench.pipeline.unet, bench.stack, probe, boxes, method=method)  # type: ignore[arg-type]
            for probe in probes
        ]
        right = [np.equal(one.top, own) for one, own in zip(scored, owners, strict=True)]
        shares = torch.stack([one.shares for one in scored]).mean(dim=0)
        found[method] = {"right": float(np.mean(right)), "shares": shares.tolist()}
    return found


def _inverted(bench: _Bench) -> Values:
    spec = bench.spec
    rows: dict[str, list[Ablation]] = {}
    errors = []
    for drawing in bench.drawings:
        way = trajectory(bench.pipeline, bench.stack, drawing)
        back = invert(
            bench.pipeline,
            bench.stack,
            drawing,
            way[-1],
            guidance_scale=spec.guidance,
            fixed_point_iters=spec.fixed_point_iters,
        )
        errors.append(float((back[0] - way[0]).norm() / way[0].norm()))
        for name, latents in (("cached", way), ("inverted", back)):
            for start in (0, spec.resume):
                one = pseudo_ablate(bench.pipeline, bench.stack, drawing, latents, start=start)
                rows.setdefault(f"{name}, from step {start}", []).append(one)
    return {
        "iterations": spec.fixed_point_iters,
        "noise_error": float(np.mean(errors)),
        "rows": {name: list(agreement(found, bench.true)) for name, found in rows.items()},
    }


STAGES: dict[str, Callable[[_Bench], Values]] = {
    "ablation": _ablation,
    "late start": _late,
    "blocks": _blocks,
    "sparse codes": _sparse,
    "boxes": _boxes,
    "inversion": _inverted,
}


def run_attribution(spec: AttributionSpec, out: Path) -> Path:
    """Run what has not been run, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    records = Records(out, spec, AttributionRecord)
    done = {record.stage: record.values for record in records.held}
    bench = _Bench.of(spec)
    with progress("attribution", len(STAGES), len(done)) as advance:
        for stage, run in STAGES.items():
            if stage in done:
                continue
            done[stage] = run(bench)
            records.append(AttributionRecord(stage, done[stage]))
            advance()
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    more = sections(bench.stack.names, spec.mixture, len(bench.drawings), done, folder)
    published = published_section(spec.source, spec.published)
    write_report(folder, spec.title, [_introduction(bench, folder), *more, published])
    return folder


def _introduction(bench: _Bench, folder: Path) -> Section:
    spec, shown = bench.spec, min(3, len(bench.drawings) - 1)
    intro = (
        f"Adapters {', '.join(spec.adapters)} of the bundled testbed at scale {spec.scale:g} on "
        f"{spec.base}; {len(bench.drawings)} pictures: {', '.join(spec.digits)}, seeds a digit: "
        f"{spec.seeds}; {spec.steps} steps, guidance {spec.guidance:g}. True ablation draws the "
        "picture again from the same noise without one adapter; all else is compared with it."
    )
    one = ablate(bench.pipeline, bench.stack, bench.drawings[shown])
    legend = (
        f"`{bench.drawings[shown].prompt}`: with all adapters, and with none; then without each: "
        "the picture, what that changed, and the change over the picture."
    )
    picture = Figure(save_pictures(one, folder / "pictures.png"), legend)
    return Section("What this is", (intro, picture))
