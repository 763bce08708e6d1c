"""The sections of the report on erased digits."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_ws.diffusion.digits import NAMES
from lora_ws.experiments.cad.spec import CAD, METHODS, NONE, SCORES, CadSpec, Key, says
from lora_ws.experiments.cad.statements import Done, shares_of, statements_of
from lora_ws.experiments.statements import statement_tiles, statements_grid
from lora_ws.report.charts import chart_lines
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Figure, Section


def cad_sections(spec: CadSpec, done: Done, accuracy: float, folder: Path) -> list[Section]:
    """Everything that the report says.

    Args:
        spec: of the experiment.
        done: key of a record -> its values.
        accuracy: of the judge, from 0 to 1.
        folder: of the report, which holds an image of each digit; the chart goes there.
    """
    statements = statements_of(spec, done)
    sections = [
        Section("Summary", (statement_tiles(statements), *_introduction(spec, accuracy))),
        Section("What the paper states", (statements_grid("the paper", statements),)),
        *(Section(f"{digit} erased", _erased(spec, digit, done, folder)) for digit in spec.digits),
        Section(
            "Do scores say what happens?", (_validity_grid(spec, done), _whole_grid(spec, done))
        ),
        Section("How few weights hold a concept", _concentration(spec, done, folder)),
        Section("Amplified", (_amplified_grid(spec, done),)),
    ]
    rows = tuple((Cell(k), Cell(v)) for k, v in spec.published.items())
    sections.append(Section("Published", (spec.source, Grid(("quantity", "value"), rows, left=2))))
    return sections


def _introduction(spec: CadSpec, accuracy: float) -> tuple[str, Grid]:
    text = (
        f"Base {spec.base}. Scores from {spec.seeds} trajectories of {spec.steps} steps, guidance "
        f"{spec.guidance:g}; a share of each {spec.per} of the feed-forward matrices is set to 0. "
        f"{spec.images} images of an erased digit by each wording, {spec.neighbours} of each of "
        "the others, the same noise for every digit and edit, judged by a support-vector machine "
        f"that is right on {100 * accuracy:.1f} % of real digits it has not seen. With these n, "
        "differences of less than some 15 points in the first number mean little."
    )
    methods = Grid(
        ("method", "which weights"), tuple((Cell(k), Cell(v)) for k, v in METHODS.items()), left=2
    )
    return text, methods


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _row(name: str, texts: Iterable[str]) -> tuple[Cell, ...]:
    return (Cell(name), *map(Cell, texts))


def _erased(spec: CadSpec, digit: str, done: Done, folder: Path) -> tuple[Any, ...]:
    budget = f"{100 * spec.shown_budget:g} %"
    caption = f"Before, and after each edit at a budget of {budget}; the same noise in every row."
    return (
        _budgets_grid(spec, digit, done),
        _wordings_grid(spec, digit, done),
        _neighbours_grid(spec, digit, done),
        Figure(folder / f"{digit}.png", caption),
    )


def _at(spec: CadSpec, digit: str, done: Done) -> list[tuple[str, Any]]:
    """No edit, and every edit at the budget that is shown."""
    plain = (NONE, done[Key("edit", digit, NONE)])
    return [plain, *((m, done[Key("edit", digit, m, spec.shown_budget)]) for m in METHODS)]


def _budgets_grid(spec: CadSpec, digit: str, done: Done) -> Grid:
    def text(method: str, budget: float) -> str:
        own, others = shares_of(done[Key("edit", digit, method, budget)], digit)
        return f"{_percent(own)} / {_percent(float(np.mean(others)))}"

    rows = [_row(NONE, [text(NONE, 0.0)] * len(spec.budgets))]
    rows += [_row(m, (text(m, b) for b in spec.budgets)) for m in METHODS]
    head = ("edit", *(f"{100 * budget:g} %" for budget in spec.budgets))
    changed = (done[Key("edit", digit, CAD, budget)]["changed"] for budget in spec.budgets)
    caption = (
        f"Images of `{digit}` that still show it / images of the other nine that show them, "
        f"percent, by the share of weights set to 0 ({', '.join(map(str, changed))} weights for "
        "CAD)."
    )
    return Grid(head, tuple(rows), caption)


def _wordings_grid(spec: CadSpec, digit: str, done: Done) -> Grid:
    rows = [
        _row(
            name,
            map(_percent, (found["shown"][digit], *(found["wordings"][w] for w in spec.wordings))),
        )
        for name, found in _at(spec, digit, done)
    ]
    head = ("edit", *(f"`{says(w, digit)}`" for w in (spec.prompt, *spec.wordings)))
    caption = (
        f"Images that still show the digit by what is asked for, percent, at "
        f"{100 * spec.shown_budget:g} %. Scores are of the first wording alone."
    )
    return Grid(head, tuple(rows), caption)


def _neighbours_grid(spec: CadSpec, digit: str, done: Done) -> Grid:
    others = spec.others(digit)
    rows = [
        _row(name, (*(_percent(found["shown"][o]) for o in others), f"{found['moved']:.3f}"))
        for name, found in _at(spec, digit, done)
    ]
    caption = (
        f"Damage to the others at {100 * spec.shown_budget:g} %: images that show them, percent, "
        "and how far theirs are from those before, mean absolute difference of pixels from -1 to 1."
    )
    return Grid(("edit", *others, "pixels"), tuple(rows), caption)


def _validity_grid(spec: CadSpec, done: Done) -> Grid:
    rows = []
    for digit in spec.digits:
        found = done[Key("scores", digit)]
        for name in SCORES:
            errors = 100 * np.array(found["errors"][name])
            texts = f"{found['correlation'][name]:.2f}", f"{np.median(errors):.0f}"
            rows.append(
                _row(f"{digit}: {name}", (*texts, f"{errors.min():.0f} to {errors.max():.0f}"))
            )
    caption = (
        "Correlation of predicted and true changes of the measure over 20 random edits of one "
        f"weight in a hundred; and how far the prediction is off the truth, percent of it, for "
        f"single weights: the {spec.singles} that CAD scores highest by magnitude, set to 0 one at "
        "a time. Integrated scores are of what happens when all weights go."
    )
    head = ("scores", "correlation", "single weight, median error", "range")
    return Grid(head, tuple(rows), caption)


def _whole_grid(spec: CadSpec, done: Done) -> Grid:
    rows = []
    for digit in spec.digits:
        whole = done[Key("scores", digit)]["J"]
        for name in SCORES:
            for budget in spec.budgets:
                found = done[Key("edit", digit, name, budget)]
                shares = (100 * found[key] / whole for key in ("predicted", "true"))
                rows.append(
                    _row(f"{digit}: {name}, {100 * budget:g} %", (f"{s:.0f}" for s in shares))
                )
    caption = (
        "Fall of the measure by whole edits, percent of it: the sum of scores, and what is "
        "measured. The measure cannot fall by more than 100 %."
    )
    return Grid(("edit", "predicted", "true"), tuple(rows), caption)


def _concentration(spec: CadSpec, done: Done, folder: Path) -> tuple[Any, ...]:
    shares = [f"{100 * share:g} %" for share in spec.concentrated]
    series, rows = {}, []
    for digit in spec.digits:
        for name, held in done[Key("scores", digit)]["concentration"].items():
            rows.append(_row(f"{digit}: {name}", map(_percent, held)))
            points = zip(spec.concentrated, held, strict=True)
            series[f"{digit}: {name}"] = {100 * share: (100 * h, 0.0) for share, h in points}
    caption = "Percent of the sum of positive scores that the highest weights hold."
    chart = chart_lines(
        series,
        folder / "concentration.png",
        title="How few weights hold the positive score",
        chance=None,
        xlabel="weights, percent, from the highest on",
        ylabel="positive score, percent",
    )
    return Grid(("scores", *shares), tuple(rows), caption), Figure(chart, caption)


def _amplified_grid(spec: CadSpec, done: Done) -> Grid:
    found = [done[Key("amplify", digit)] for digit in NAMES]
    rows = [_row(name, _spread([one[name] for one in found])) for name in found[0]]
    caption = (
        f"Images for the bare word, such as `{says(spec.amplified, NAMES[0])}`, that show the "
        f"digit, percent: mean over {len(found)} digits ± standard error, {spec.images} images "
        f"each; then the least and the most. {100 * spec.amplify_budget:g} % of all weights are "
        "set to 0, those that work most against the digit."
    )
    return Grid(("edit", "shown", "least", "most"), tuple(rows), caption)


def _spread(shares: Sequence[float]) -> tuple[str, str, str]:
    error = np.std(shares, ddof=1) / np.sqrt(len(shares))
    mean = f"{100 * np.mean(shares):.0f} ± {100 * error:.0f}"
    return mean, _percent(min(shares)), _percent(max(shares))
