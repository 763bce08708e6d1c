"""The sections of the report on composition."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from lora_ws.composition.elements import ELEMENTS
from lora_ws.diffusion.digits import NAMES
from lora_ws.experiments.composition.spec import (
    MERGE,
    METHODS,
    NONE,
    CompositionRecord,
    CompositionSpec,
    Key,
    Names,
    named_sizes,
    switch_named,
)
from lora_ws.experiments.quoted import published_section
from lora_ws.report.charts import chart_lines
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.page import Figure, Section

Done = Mapping[Key, CompositionRecord]
# By whether prompts name a digit; each shows so many pictures of a set.
PICTURES = {False: "pictures.png", True: "named.png"}
SHOWN = 8
NOT_MEASURED = (
    "CLIPScore and a vision model's judgement are not measured here: both need models that are not "
    "bundled; see lora_ws.composition.clip_score and .endpoint."
)


def composition_sections(
    spec: CompositionSpec, done: Done, accuracy: Mapping[str, float], folder: Path
) -> list[Section]:
    """Everything that the report says.

    Args:
        spec: of the experiment.
        done: its records.
        accuracy: of the judge, by category.
        folder: of the report, which holds `PICTURES`; the chart goes there.
    """
    right = ", ".join(f"{100 * share:.1f} % ({name})" for name, share in accuracy.items())
    counts = ", ".join(f"{len(done[MERGE, n, False].sets)} of {n}" for n in spec.sizes)
    bare = ", ".join(f"{len(done[MERGE, n, True].sets)} of {n}" for n in named_sizes(spec))
    intro = (
        f"Eleven adapters of {spec.base} in the five categories of ComposLoRA, made for this, all "
        f"at scale 1. {spec.steps} steps, guidance {spec.guidance:g}, the same noise for all."
    )
    how = (
        f"Every set with a character ({counts}) is drawn for `{spec.prompt}`, which names no "
        "digit: the character's adapter must say which. Pictures per set and method: "
        f"{spec.images}. Every set of the others ({bare}) is drawn for `{spec.named}` with "
        f"{spec.digits} digits each: there the prompt says which digit, and adapters should "
        "leave it alone."
    )
    judge = (
        "An element counts as shown, and a digit as kept, when a support-vector machine finds it; "
        "on rendered digits it has not seen, elements mixed at random, the machines are right on "
        f"{right}."
    )
    with_character = (
        _grid(spec.sizes, lambda m, n: _share(done[m, n, False]), ELEMENTS_SHOWN),
        _grid(spec.sizes, lambda m, n: _all(done[m, n, False]), "Pictures that show all, percent."),
        _category_grid(spec, done),
        _wins_grid(spec, done),
    )
    sizes = named_sizes(spec)
    named = (
        _grid(sizes, lambda m, n: _kept(done[m, n, True]), "Digits kept, percent."),
        _grid(sizes, lambda m, n: _share(done[m, n, True]), ELEMENTS_SHOWN),
    )
    return [
        Section("What this is", (intro, how, judge)),
        Section("The prompt names a digit: is it kept?", named),
        Section("A character among the adapters: which elements are shown?", with_character),
        Section("Turns of Switch", _tau_parts(spec, done, folder)),
        Section("Each adapter alone", (_single_grid(done),)),
        Section("Pictures", tuple(_picture(spec, done, named, folder) for named in PICTURES)),
        published_section(spec.source, spec.published, NOT_MEASURED),
    ]


def shown_set(spec: CompositionSpec, done: Done, named: bool) -> Names:
    """The set that the report shows: the last of the largest."""
    return done[MERGE, max(named_sizes(spec) if named else spec.sizes), named].sets[-1]


def shown_prompts(spec: CompositionSpec, named: bool) -> list[str]:
    """Prompts of the pictures that the report shows."""
    return [spec.named.format(digit) if named else spec.prompt for digit in NAMES[:SHOWN]]


def _picture(spec: CompositionSpec, done: Done, named: bool, folder: Path) -> Figure:
    prompts, names = shown_prompts(spec, named), ", ".join(shown_set(spec, done, named))
    text = f"`{prompts[0]}` to `{prompts[-1]}`" if named else f"`{prompts[0]}`"
    caption = f"{names}; {text}; the same noise in every column."
    return Figure(folder / PICTURES[named], caption)


ELEMENTS_SHOWN = "Elements of the set that are shown, percent, ± standard error over sets."
Value = tuple[float, str]


def _grid(sizes: Iterable[int], value: Callable[[str, int], Value], caption: str) -> Grid:
    """One row per method, one column per size, the best of each column marked."""
    columns = {f"n = {n}": [value(method, n) for method in METHODS] for n in sizes}
    return _columns(columns, caption)


def _columns(columns: Mapping[str, list[Value]], caption: str) -> Grid:
    # Nothing is no best.
    ranks = [
        ranked([value or None for value, _ in column], [text for _, text in column])
        for column in columns.values()
    ]
    rows = zip((Cell(name) for name in METHODS), *ranks, strict=True)
    return Grid(("method", *columns), tuple(rows), caption)


def _share(record: CompositionRecord) -> Value:
    mean, error = record.share
    return mean, f"{mean:.1f} ± {error:.1f}"


def _all(record: CompositionRecord) -> Value:
    value = 100 * float(record.array.all(axis=2).mean())
    return value, f"{value:.1f}"


def _kept(record: CompositionRecord) -> Value:
    value = 100 * float(np.mean(record.kept))
    return value, f"{value:.1f}"


def _category_grid(spec: CompositionSpec, done: Done) -> Grid:
    def share(method: str, category: str) -> Value:
        hits = [
            column.mean()
            for record in (done[method, size, False] for size in spec.sizes)
            for names, shown in zip(record.sets, record.array, strict=True)
            for name, column in zip(names, shown.T, strict=True)
            if ELEMENTS[name].category == category
        ]
        value = 100 * float(np.mean(hits))
        return value, f"{value:.1f}"

    categories = dict.fromkeys(element.category for element in ELEMENTS.values())
    columns = {c: [share(method, c) for method in METHODS] for c in categories}
    return _columns(columns, "Elements that are shown by category, sets of all sizes, percent.")


def _wins_grid(spec: CompositionSpec, done: Done) -> Grid:
    rows = []
    for name in (method for method in METHODS if method not in (NONE, MERGE)):
        cells = []
        for size in spec.sizes:
            ours, theirs = (done[key, size, False].array.sum(axis=2) for key in (name, MERGE))
            wins, losses = 100 * (ours > theirs).mean(), 100 * (ours < theirs).mean()
            cells.append(Cell(f"{wins:.0f} / {losses:.0f}"))
        rows.append((Cell(name), *cells))
    caption = (
        "Pairs from the same noise where the method shows more elements than merge / fewer, "
        "percent; the rest are ties."
    )
    return Grid(("method", *(f"n = {n}" for n in spec.sizes)), tuple(rows), caption)


def _single_grid(done: Done) -> Grid:
    with_, without = done[MERGE, 1, False], done[NONE, 1, False]
    rows = tuple(
        (Cell(name), Cell(f"{100 * there.mean():.0f}"), Cell(f"{100 * none.mean():.0f}"))
        for (name,), there, none in zip(with_.sets, with_.array, without.array, strict=True)
    )
    caption = f"Pictures that show the element, percent, of {with_.array.shape[1]} each."
    return Grid(("adapter", "with it", NONE), rows, caption)


def _tau_parts(spec: CompositionSpec, done: Done, folder: Path) -> tuple[Grid, Figure, str]:
    size = spec.tau_size
    points = {tau: done[switch_named(tau), size, False].share for tau in spec.taus}
    judged = done[NONE, size, False].array.size
    chart = chart_lines(
        {"switch": points},
        folder / "tau.png",
        title=f"Switch on sets of {size}: mean ± error, {judged} judgements",
        chance=done[NONE, size, False].share[0],
        xlabel="steps of a turn (tau)",
        ylabel="elements shown, percent",
        guess=NONE,
    )
    values = ranked(
        [mean for mean, _ in points.values()], [f"{m:.1f} ± {e:.1f}" for m, e in points.values()]
    )
    grid = Grid(("sets", *(f"tau = {tau}" for tau in points)), ((Cell(f"of {size}"), *values),))
    text = (
        f"Of {spec.steps} steps; the paper's best turn is 5 of 100 to 200. From turns of "
        f"{-(-spec.steps // (size - 1))} steps on the last adapter never acts."
    )
    return (
        grid,
        Figure(chart, "Elements shown by the length of a turn; bars are ± an error."),
        text,
    )
