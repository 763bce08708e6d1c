"""The sections of the report on erased digits."""

from collections.abc import Mapping
from pathlib import Path

from lora_ws.experiments.cad.spec import METHODS, CadRecord, CadSpec
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Figure, Section

Done = Mapping[tuple[str, str, float], CadRecord]


def cad_sections(
    spec: CadSpec,
    done: Done,
    correlations: Mapping[str, Mapping[str, float]],
    accuracy: float,
    folder: Path,
) -> list[Section]:
    """Everything that the report says.

    Args:
        spec: of the experiment.
        done: its records.
        correlations: digit -> method -> correlation of predicted and true changes.
        accuracy: of the judge, from 0 to 1.
        folder: of the report, which holds a picture of each digit.
    """
    intro = (
        f"Base {spec.base}. Scores from {spec.seeds} trajectories of {spec.steps} steps, guidance "
        f"{spec.guidance:g}; a share of each {spec.per} of the feed-forward matrices is set to 0. "
        f"{spec.images} pictures of every digit, the same noise for every edit, judged by a "
        f"support-vector machine that is right on {100 * accuracy:.1f} % of real digits it has not "
        "seen. With these n, differences of less than some 15 points in the first number mean "
        "little."
    )
    methods = Grid(
        ("method", "which weights"), tuple((Cell(k), Cell(v)) for k, v in METHODS.items()), left=2
    )
    sections = [Section("What this is", (intro, methods))]
    for digit in spec.digits:
        caption = f"Before, and after each edit at a budget of {100 * shown_budget(spec):g} %."
        figure = Figure(folder / f"{digit}.png", caption)
        parts = (_grid(spec, digit, done), _validity(correlations[digit]), figure)
        sections.append(Section(f"{digit} erased", parts))
    rows = tuple((Cell(k), Cell(v)) for k, v in spec.published.items())
    sections.append(Section("Published", (spec.source, Grid(("quantity", "value"), rows, left=2))))
    return sections


def shown_budget(spec: CadSpec) -> float:
    """The budget of the pictures: the second, or the only one."""
    return spec.budgets[min(1, len(spec.budgets) - 1)]


def _grid(spec: CadSpec, digit: str, held: Done) -> Grid:
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
