"""The sections of the report on composition."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from lora_ws.composition.elements import ELEMENTS
from lora_ws.diffusion.digits import NAMES
from lora_ws.diffusion.methods import Switch
from lora_ws.diffusion.turns import AdaptiveSwitch
from lora_ws.experiments.composition.spec import (
    ADAPTIVE,
    MERGE,
    METHODS,
    NONE,
    SWITCH,
    CompositionRecord,
    CompositionSpec,
    CostRecord,
    Key,
    Names,
    named_sizes,
    turns_named,
)
from lora_ws.experiments.composition.statements import Costs, Done, both_styles, statements_of
from lora_ws.experiments.quoted import published_section
from lora_ws.experiments.statements import statement_tiles, statements_grid
from lora_ws.report.charts import chart_lines
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.page import Figure, Section

# By whether prompts name a digit; each shows so many images of a set.
PICTURES = {False: "pictures.png", True: "named.png"}
SHOWN = 8
NOT_MEASURED = (
    "CLIPScore and a vision model's judgement are not measured here: both need models that are not "
    "bundled; see lora_ws.composition.clip_score and .endpoint."
)


def composition_sections(
    spec: CompositionSpec,
    done: Done,
    costs: Costs,
    accuracy: Mapping[str, float],
    folder: Path,
) -> list[Section]:
    """Everything that the report says.

    Args:
        spec: of the experiment.
        done: its records.
        costs: what methods take, by method and size.
        accuracy: of the judge, by category.
        folder: of the report, which holds `PICTURES`; the chart goes there.
    """
    right = ", ".join(f"{100 * share:.1f} % ({name})" for name, share in accuracy.items())
    counts = ", ".join(f"{len(done[Key(MERGE, n, 'character')].sets)} of {n}" for n in spec.sizes)
    bare = ", ".join(f"{len(done[Key(MERGE, n, 'named')].sets)} of {n}" for n in named_sizes(spec))
    intro = (
        f"Eleven adapters of {spec.base} in the five categories of ComposLoRA, made for this, all "
        f"at scale 1. {spec.steps} steps, guidance {spec.guidance:g}, the same noise for all."
    )
    how = (
        f"Every set with a character ({counts}) is drawn for `{spec.prompt}`, which names no "
        "digit: the character's adapter must say which. Images per set and method: "
        f"{spec.images}. Every set of the others ({bare}) is drawn for `{spec.named}` with "
        f"{spec.digits} digits each: there the prompt says which digit, and adapters should "
        "leave it alone."
    )
    judge = (
        "An element counts as shown, and a digit as kept, when a support-vector machine finds it; "
        "on rendered digits it has not seen, elements mixed at random, the machines are right on "
        f"{right}."
    )
    statements = statements_of(spec, done, costs)
    with_character = (
        _grid(spec.sizes, lambda m, n: _share(done[Key(m, n, "character")]), ELEMENTS_SHOWN),
        _grid(spec.sizes, lambda m, n: _all(done[Key(m, n, "character")]), ALL_SHOWN),
        _category_grid(spec, done),
        _wins_grid(spec, done),
    )
    sizes = named_sizes(spec)
    named = (
        _grid(sizes, lambda m, n: _kept(done[Key(m, n, "named")]), "Digits kept, percent."),
        _grid(sizes, lambda m, n: _share(done[Key(m, n, "named")]), ELEMENTS_SHOWN),
    )
    return [
        Section("Summary", (statement_tiles(statements), intro, how, judge)),
        Section("What the paper states", (statements_grid("the paper", statements),)),
        Section("The prompt names a digit: is it kept?", named),
        Section("A character among the adapters: which elements are shown?", with_character),
        Section("Turns of Switch", _tau_parts(spec, done, folder)),
        Section("Two styles at once", (_styles_grid(spec, done),)),
        Section("What it costs", (_cost_grid(spec, costs),)),
        Section("Each adapter alone", (_single_grid(done),)),
        Section("Images", tuple(_picture(spec, done, named, folder) for named in PICTURES)),
        published_section(spec.source, spec.published, NOT_MEASURED),
    ]


def shown_set(spec: CompositionSpec, done: Done, named: bool) -> Names:
    """The set that the report shows: the last of the largest."""
    size = max(named_sizes(spec) if named else spec.sizes)
    return done[Key(MERGE, size, "named" if named else "character")].sets[-1]


def shown_prompts(spec: CompositionSpec, named: bool) -> list[str]:
    """Prompts of the images that the report shows."""
    return [spec.named.format(digit) if named else spec.prompt for digit in NAMES[:SHOWN]]


def _picture(spec: CompositionSpec, done: Done, named: bool, folder: Path) -> Figure:
    prompts, names = shown_prompts(spec, named), ", ".join(shown_set(spec, done, named))
    text = f"`{prompts[0]}` to `{prompts[-1]}`" if named else f"`{prompts[0]}`"
    caption = f"{names}; {text}; the same noise in every column."
    return Figure(folder / PICTURES[named], caption)


ALL_SHOWN = "Images that show all, percent."
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
            for record in (done[Key(method, size, "character")] for size in spec.sizes)
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
            ours, theirs = (
                done[Key(key, size, "character")].array.sum(axis=2) for key in (name, MERGE)
            )
            wins, losses = 100 * (ours > theirs).mean(), 100 * (ours < theirs).mean()
            cells.append(Cell(f"{wins:.0f} / {losses:.0f}"))
        rows.append((Cell(name), *cells))
    caption = (
        "Pairs from the same noise where the method shows more elements than merge / fewer, "
        "percent; the rest are ties."
    )
    return Grid(("method", *(f"n = {n}" for n in spec.sizes)), tuple(rows), caption)


def _single_grid(done: Done) -> Grid:
    with_, without = (done[Key(name, 1, "character")] for name in (MERGE, NONE))
    rows = tuple(
        (Cell(name), Cell(f"{100 * there.mean():.0f}"), Cell(f"{100 * none.mean():.0f}"))
        for (name,), there, none in zip(with_.sets, with_.array, without.array, strict=True)
    )
    caption = f"Images that show the element, percent, of {with_.array.shape[1]} each."
    return Grid(("adapter", "with it", NONE), rows, caption)


def _tau_parts(spec: CompositionSpec, done: Done, folder: Path) -> tuple[Grid | Figure | str, ...]:
    size = spec.tau_size
    fixed = {tau: _turned(spec, done, Switch(tau)).share for tau in spec.taus}
    adaptive = {turns: _turned(spec, done, AdaptiveSwitch(turns)).share for turns in spec.adaptive}
    none = done[Key(NONE, size, "character")]
    chart = chart_lines(
        {"switch": fixed},
        folder / "tau.png",
        title=f"Switch on sets of {size}: mean ± error, {none.array.size} judgements",
        chance=none.share[0],
        xlabel="steps of a turn (tau)",
        ylabel="elements shown, percent",
        guess=NONE,
    )
    text = (
        f"Of {spec.steps} steps; the paper's best turn is 5 of 100 to 200. From turns of "
        f"{-(-spec.steps // (size - 1))} steps on the last adapter never acts."
    )
    caption = (
        "Turns of an adaptive switch end where the latents of the base have moved equally far, so "
        "that first turns are short and every adapter acts."
    )
    return (
        _turns_grid(f"{SWITCH}, sets of {size}", "tau", fixed),
        Figure(chart, "Elements shown by the length of a turn; bars are ± an error."),
        text,
        _turns_grid(f"{ADAPTIVE}, sets of {size}", "turns of each", adaptive),
        caption,
    )


def _turned(
    spec: CompositionSpec, done: Done, method: Switch | AdaptiveSwitch
) -> CompositionRecord:
    return done[Key(turns_named(method), spec.tau_size, "character")]


def _turns_grid(name: str, what: str, points: Mapping[int, tuple[float, float]]) -> Grid:
    values = ranked(
        [mean for mean, _ in points.values()], [f"{m:.1f} ± {e:.1f}" for m, e in points.values()]
    )
    return Grid(("", *(f"{what} = {n}" for n in points)), ((Cell(name), *values),), ELEMENTS_SHOWN)


def _styles_grid(spec: CompositionSpec, done: Done) -> Grid:
    columns: dict[str, list[Value]] = {}
    for size in spec.both_sizes:
        records = [done[Key(method, size, "styles")] for method in METHODS]
        columns[f"n = {size}: elements"] = [_share(record) for record in records]
        for count, says in ((2, "both styles"), (1, "one")):
            shares = [100 * float((both_styles(one) == count).mean()) for one in records]
            columns[f"n = {size}: {says}"] = [(share, f"{share:.1f}") for share in shares]
    counts = ", ".join(f"{len(done[Key(MERGE, n, 'styles')].sets)} of {n}" for n in spec.both_sizes)
    caption = (
        f"Every set with a character and both styles ({counts}), {spec.both_images} images each: "
        "elements that are shown, percent, ± standard error over sets; and images that show "
        "both styles, or one of them. Sets of the paper have one style at most."
    )
    return _columns(columns, caption)


def _cost_grid(spec: CompositionSpec, costs: Costs) -> Grid:
    def text(cost: CostRecord) -> str:
        rows, seconds = cost.rows / spec.cost_images, cost.seconds / spec.cost_images
        return f"{rows:g} rows, {seconds:.2f} s"

    rows = tuple(
        (
            Cell(name),
            Cell(str(costs[name, spec.sizes[0]].calls)),
            *(Cell(text(costs[name, size])) for size in spec.sizes),
        )
        for name in METHODS
    )
    caption = (
        f"Of one image of {spec.steps} steps with guidance, drawn {spec.cost_images} at a time: "
        "rows of the batches that the U-Net is called with, and CPU seconds (one thread, the "
        "median of three runs, decoding included). Composite calls it once a step, with a row for "
        "each adapter; an adaptive switch draws the base once before."
    )
    return Grid(("method", "calls", *(f"n = {n}" for n in spec.sizes)), rows, caption)
