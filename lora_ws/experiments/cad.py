"""A digit erased from ``digit-sd``: what is left of it, and of the others, by method and budget."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_ws.concepts.edit import Per, SparseEdit, choose, magnitude_control, random_control
from lora_ws.concepts.objective import Objective, eligible_weights, erase_objective
from lora_ws.concepts.scores import contrast, contributions, validity
from lora_ws.diffusion.digits import NAMES, DigitJudge, check_digits
from lora_ws.diffusion.pipeline import generate, load_pipeline
from lora_ws.experiments.records import Records
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.images import save_grid
from lora_ws.report.page import Figure, Section, write_report
from lora_ws.report.progress import progress

METHODS = {
    "random": "as many weights, drawn at random",
    "largest": "as many weights, the largest of each matrix",
    "CAD": "weight times gradient, the other prediction taken for a constant",
    "CAD, true first order": "the same, gradients through both predictions",
    "CAD, contrastive": "CAD less what the other nine digits need",
}
SHOWN_IMAGES, SHOWN_BUDGET = 8, 1


@dataclass(frozen=True)
class CadSpec:
    """An experiment on digits.

    Attributes:
        title: of the report.
        source: of the published numbers.
        base: name of the base model; one that knows digits by name.
        digits: that are erased, one at a time.
        budgets: shares of weights.
        per: what the shares are of.
        seeds: trajectories behind the scores.
        steps: latents of each.
        guidance: scale of guidance, of trajectories and of pictures.
        images: drawn and judged of every digit.
        published: quantity -> value.
    """

    title: str
    source: str
    base: str
    digits: tuple[str, ...]
    budgets: tuple[float, ...]
    per: Per
    seeds: int
    steps: int
    guidance: float
    images: int
    published: dict[str, str]

    def __post_init__(self) -> None:
        check_digits(self.digits)


@dataclass(frozen=True)
class CadRecord:
    """One edit, judged.

    Attributes:
        digit: that was erased.
        method: one of `METHODS`, or "none".
        budget: share of weights.
        changed: how many.
        target: share of the digit's pictures that still show it.
        others: mean share of the other digits' pictures that show them.
    """

    digit: str
    method: str
    budget: float
    changed: int
    target: float
    others: float

    @property
    def key(self) -> tuple[str, str, float]:
        """What it is of."""
        return self.digit, self.method, self.budget


def run_cad(spec: CadSpec, out: Path) -> Path:
    """Erase, draw, judge and report; what has been judged is not judged again.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    pipeline, judge = load_pipeline(spec.base), DigitJudge.train()
    weights = eligible_weights(pipeline.unet)
    records = Records(out, spec, CadRecord)
    done = {record.key: record for record in records.held}
    total = len(spec.digits) * (1 + len(METHODS) * len(spec.budgets))
    valid: dict[str, dict[str, float]] = {}
    with progress("cad", total, len(done)) as advance:
        for digit in spec.digits:
            edits, valid[digit] = _edits(spec, pipeline, weights, digit)
            for (method, budget), edit in edits.items():
                if (digit, method, budget) in done:
                    continue
                block = edit.applied(pipeline.unet) if edit else nullcontext()
                target, others = _judged(spec, pipeline, judge, digit, block)
                changed = edit.changed if edit else 0
                record = CadRecord(digit, method, budget, changed, target, others)
                records.append(record)
                done[record.key] = record
                advance()
            _pictures(spec, pipeline, digit, edits, out / f"{digit}.png")
    folder = out / "report"
    _report(spec, folder, list(done.values()), valid, judge, out)
    return folder


Edits = dict[tuple[str, float], SparseEdit | None]


def _edits(
    spec: CadSpec, pipeline: Any, weights: Mapping[str, nn.Parameter], digit: str
) -> tuple[Edits, dict[str, float]]:
    def objective(name: str, stop_gradient: bool = True) -> Objective:
        how = {"steps": spec.steps, "guidance": spec.guidance, "stop_gradient": stop_gradient}
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


def _judged(
    spec: CadSpec,
    pipeline: Any,
    judge: DigitJudge,
    digit: str,
    block: AbstractContextManager[None],
) -> tuple[float, float]:
    prompts = [f"a photo of {name}" for name in NAMES for _ in range(spec.images)]
    with block:
        images = generate(pipeline, prompts, spec.guidance, 20)
    truth = np.repeat(np.arange(len(NAMES)), spec.images)
    shares = (judge.digits(images) == truth).reshape(len(NAMES), -1).mean(axis=1)
    at = NAMES.index(digit)
    return float(shares[at]), float(np.delete(shares, at).mean())


def _pictures(spec: CadSpec, pipeline: Any, digit: str, edits: Edits, file: Path) -> None:
    kept = NAMES[(NAMES.index(digit) + 1) % len(NAMES)]
    budget = spec.budgets[min(SHOWN_BUDGET, len(spec.budgets) - 1)]
    rows, labels = [], []
    for name in (digit, kept):
        for method, share in (("none", 0.0), *((m, budget) for m in METHODS)):
            edit = edits[method, share]
            with edit.applied(pipeline.unet) if edit else nullcontext():
                prompts = [f"a photo of {name}"] * SHOWN_IMAGES
                rows.append(generate(pipeline, prompts, spec.guidance, 20))
            labels.append(f"{name}: {method}")
    save_grid(torch.cat(rows), SHOWN_IMAGES, file, 4, labels)


def _report(
    spec: CadSpec,
    folder: Path,
    records: list[CadRecord],
    valid: Mapping[str, Mapping[str, float]],
    judge: DigitJudge,
    out: Path,
) -> None:
    folder.mkdir(exist_ok=True)
    right = 100 * judge.accuracy
    intro = (
        f"Base {spec.base}. Scores from {spec.seeds} trajectories of {spec.steps} steps, guidance "
        f"{spec.guidance:g}; a share of each {spec.per} of the feed-forward matrices is set to 0. "
        f"{spec.images} pictures of every digit, the same noise for every edit, judged by a "
        f"support-vector machine that is right on {right:.1f} % of real digits it has not seen. "
        "With these n, differences of less than some 15 points in the first number mean little."
    )
    methods = Grid(
        ("method", "which weights"), tuple((Cell(k), Cell(v)) for k, v in METHODS.items()), left=2
    )
    sections = [Section("What this is", (intro, methods))]
    for digit in spec.digits:
        file = folder / f"{digit}.png"
        file.write_bytes((out / f"{digit}.png").read_bytes())
        budget = spec.budgets[min(SHOWN_BUDGET, len(spec.budgets) - 1)]
        caption = f"Before, and after each edit at a budget of {100 * budget:g} %."
        parts = (_grid(spec, digit, records), _validity(valid[digit]), Figure(file, caption))
        sections.append(Section(f"{digit} erased", parts))
    rows = tuple((Cell(k), Cell(v)) for k, v in spec.published.items())
    sections.append(Section("Published", (spec.source, Grid(("quantity", "value"), rows, left=2))))
    write_report(folder, spec.title, sections)


def _grid(spec: CadSpec, digit: str, records: list[CadRecord]) -> Grid:
    held = {record.key: record for record in records}

    def cell(record: CadRecord) -> Cell:
        return Cell(f"{100 * record.target:.0f} / {100 * record.others:.0f}")

    plain = cell(held[digit, "none", 0.0])
    rows = [(Cell("none"), *[plain] * len(spec.budgets))]
    rows += [(Cell(m), *(cell(held[digit, m, b]) for b in spec.budgets)) for m in METHODS]
    head = ("edit", *(f"{100 * budget:g} %" for budget in spec.budgets))
    changed = ", ".join(str(held[digit, "CAD", b].changed) for b in spec.budgets)
    caption = (
        f"Pictures of `{digit}` that still show it / pictures of the other nine that show them, "
        f"percent, by the share of weights set to 0 ({changed} weights for CAD)."
    )
    return Grid(head, tuple(rows), caption)


def _validity(found: Mapping[str, float]) -> str:
    said = ", ".join(f"{value:.2f} for {name}" for name, value in found.items())
    return (
        "Correlation of predicted and true changes of the measure over 20 random edits of one "
        f"weight in a hundred: {said}."
    )
