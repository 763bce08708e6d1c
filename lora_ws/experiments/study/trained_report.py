"""What the studies that train say: a table and a curve for each."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from lora_ws.experiments.study.trained import CLEAN_VALIDATION, Learned
from lora_ws.experiments.study.trainings import TRAININGS
from lora_ws.learn.spec import slug
from lora_ws.report.charts import chart_lines
from lora_ws.report.grid import Cell, Grid
from lora_ws.report.page import Figure, Section

CONFIDENCE = 0.95
By = Mapping[float, Sequence[Learned]]


def trained_sections(found: Sequence[Learned], folder: Path) -> tuple[list[Section], list[Grid]]:
    """A section for each study that trains, another for readers with clean validation labels.

    Args:
        found: results of all recipes, levels and draws.
        folder: for the charts.
    """
    grids, sections = list[Grid](), list[Section]()
    for name, clean in product(TRAININGS, (False, True)):
        readers: dict[str, dict[float, list[Learned]]] = {}
        for one in found:
            if one.study == name and one.model.endswith(CLEAN_VALIDATION) == clean:
                reader = one.model.removesuffix(CLEAN_VALIDATION)
                readers.setdefault(reader, {}).setdefault(one.level, []).append(one)
        if readers:
            said = name + CLEAN_VALIDATION * clean
            grids.append(trained_grid(name, readers))
            sections.append(Section(said, (_chart(name, said, readers, folder), grids[-1])))
    return sections, grids


def trained_grid(name: str, readers: Mapping[str, By]) -> Grid:
    """A row for each recipe and level.

    Args:
        name: of the study.
        readers: recipe -> level -> results of all draws.
    """
    head = ["recipe", "level", "training rows", "accuracy, %", "difference (95 %)", "macro F1, %"]
    if name == "imbalance":
        head += ["recall of the rarest third, %", "accuracy after logit adjustment, %"]
    every = [one for levels in readers.values() for own in levels.values() for one in own]
    if told := any(one.wrong_found is not None for one in every):
        head += ["AUROC of finding wrong labels, %"]
    rows, fits = [], []
    for reader, levels in readers.items():
        plain = max(levels.values(), key=lambda own: own[0].n_train) if name == "few-shot" else None
        first = plain or levels[min(levels)]
        for level, own in levels.items():
            said = "" if own is first else _difference(own, first)
            cells = [reader, f"{level:g}", f"{np.mean([one.n_train for one in own]):.0f}"]
            cells += [_percent([one.accuracy for one in own]), said]
            cells += [_percent([one.f1 for one in own])]
            if name == "imbalance":
                adjusted = [one.adjusted for one in own if one.adjusted is not None]
                cells += [_percent([one.rare_recall for one in own])]
                cells += [_percent(adjusted) if adjusted else "–"]
            if told:
                found = [one.wrong_found for one in own if one.wrong_found is not None]
                cells += [_percent(found) if found else "–"]
            rows.append(tuple(map(Cell, cells)))
        if name == "few-shot" and (fit := fit_errors(levels)):
            fits.append(f"{reader}: error {fit[0]:.2f} n^-{fit[1]:.2f} + {fit[2]:.2f}")
    one = next(iter(next(iter(readers.values())).values()))
    title = TRAININGS[name].title
    caption = (
        f"{title[0].upper()}{title[1:]}. {one[0].data}: {one[0].n_test} test rows, which stay as "
        f"they are; {len(one)} draws, mean ± standard deviation; differences to the plainest level "
        "with Student's interval over draws, paired."
    )
    if fits:
        caption += f" Fits of {'; '.join(fits)}."
    return Grid(tuple(head), tuple(rows), caption, left=2)


def fit_errors(levels: By) -> tuple[float, float, float] | None:
    """Fit the error as ``a n^-b + c`` of the rows of a class; None of fewer than four levels.

    Example:
        >>> def one(n):
        ...     return Learned("m", "d", "few-shot", n, 0, 1, 1, 1 - 0.8 * n**-0.5 - 0.1, 0.0, 0.0)
        >>> [round(value, 2) for value in fit_errors({n: [one(n)] for n in (2, 5, 10, 20, 35)})]
        [0.8, 0.5, 0.1]
    """
    if len(levels) < 4:
        return None
    # Here, because it is slow to import.
    from scipy.optimize import curve_fit

    n = np.array(list(levels), float)
    errors = np.array([1 - np.mean([one.accuracy for one in own]) for own in levels.values()])

    def power(n: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a * n**-b + c

    bounds = ([0.0, 0.0, 0.0], [np.inf, 5.0, 1.0])
    start = [errors.max(), 0.5, errors.min() / 2]
    found = curve_fit(power, n, errors, p0=start, bounds=bounds, max_nfev=10_000)[0]
    return float(found[0]), float(found[1]), float(found[2])


def _difference(own: Sequence[Learned], first: Sequence[Learned]) -> str:
    gaps = [100 * (a.accuracy - b.accuracy) for a, b in zip(own, first, strict=True)]
    said = f"{np.mean(gaps):+.1f}"
    if len(gaps) < 2:
        return said
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * np.std(gaps, ddof=1)
    half /= np.sqrt(len(gaps))
    return f"{said} ({np.mean(gaps) - half:+.1f} to {np.mean(gaps) + half:+.1f})"


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def _chart(name: str, said: str, readers: Mapping[str, By], folder: Path) -> Figure:
    series = {
        reader: {
            level: (
                100 * float(np.mean([one.accuracy for one in own])),
                100 * float(np.std([one.accuracy for one in own], ddof=1)) if own[1:] else 0.0,
            )
            for level, own in levels.items()
        }
        for reader, levels in readers.items()
    }
    file = folder / f"{slug(said)}.png"
    one = next(iter(next(iter(readers.values())).values()))
    title, xlabel = f"{said}, {one[0].n_test} test adapters", TRAININGS[name].title
    chart_lines(series, file, title=title, chance=None, xlabel=xlabel)
    return Figure(file, f"Accuracy by level: {xlabel}; bars: standard deviation over draws.")
