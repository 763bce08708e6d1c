"""Sets of adapters composed by every method, judged by whether each element can be seen."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_ws.composition.elements import ELEMENTS, ElementJudge
from lora_ws.composition.testbed import SIZES, Testbed, bundled
from lora_ws.diffusion.conductor import compose
from lora_ws.diffusion.digits import NAMES, digit_pictures
from lora_ws.diffusion.methods import Composite, Merge, Method, Switch, Together
from lora_ws.diffusion.pipeline import (
    decode_latents,
    encode_images,
    generate,
    image_size,
    initial_noise,
    load_pipeline,
)
from lora_ws.diffusion.stack import Stack
from lora_ws.experiments.quoted import PublishedTable, published_section
from lora_ws.experiments.records import Records
from lora_ws.report.charts import chart_lines
from lora_ws.report.grid import Cell, Grid, ranked
from lora_ws.report.images import save_grid
from lora_ws.report.page import Figure, Section, write_report
from lora_ws.report.progress import progress

NONE, MERGE = "no adapter", "merge"
# Method and what its scales are multiplied by.
METHODS: dict[str, tuple[Method, float]] = {
    NONE: (Merge(), 0.0),
    MERGE: (Merge(), 1.0),
    "merge-normalised": (Merge(normalised=True), 1.0),
    "switch": (Switch(), 1.0),
    "composite": (Composite(), 1.0),
}
# Sets drawn in one batch, and pictures shown of a set.
AT_ONCE, SHOWN = 24, 8
Names = tuple[str, ...]


@dataclass(frozen=True)
class CompositionSpec:
    """An experiment on the bundled testbed.

    Attributes:
        title: of the report.
        source: of the published numbers.
        base: of the adapters.
        prompt: of all pictures; it names no digit.
        scale: of every adapter.
        steps: of denoising.
        guidance: its scale.
        images: of every set and method.
        taus: turns of Switch that are compared.
        tau_size: adapters of the sets that they are compared on.
        published: numbers of others.
        sizes: of the sets.
    """

    title: str
    source: str
    base: str
    prompt: str
    scale: float
    steps: int
    guidance: float
    images: int
    taus: tuple[int, ...]
    tau_size: int
    published: tuple[PublishedTable, ...]
    sizes: tuple[int, ...] = SIZES


@dataclass(frozen=True)
class CompositionRecord:
    """All sets of a size, drawn by one method and judged.

    Attributes:
        method: one of `METHODS`, or ``switch, tau <n>``.
        size: adapters a set.
        sets: ids of their adapters.
        shown: whether each picture shows each element, ``[sets, images, size]``.
    """

    method: str
    size: int
    sets: tuple[Names, ...]
    shown: tuple[tuple[tuple[bool, ...], ...], ...]

    @property
    def key(self) -> tuple[str, int]:
        """What it is of."""
        return self.method, self.size

    @cached_property
    def array(self) -> Bool[np.ndarray, "sets images size"]:
        """``shown`` as an array."""
        return np.array(self.shown, dtype=bool)

    @property
    def share(self) -> tuple[float, float]:
        """Percent of elements that are shown, and the standard error over sets."""
        own = 100 * self.array.mean(axis=(1, 2))
        return float(own.mean()), float(own.std(ddof=1) / np.sqrt(len(own)))


@dataclass(frozen=True, eq=False)
class _Bench:
    """What pictures are made and judged with."""

    spec: CompositionSpec
    testbed: Testbed
    pipeline: Any
    stack: Stack
    judge: ElementJudge

    @classmethod
    def of(cls, spec: CompositionSpec) -> "_Bench":
        testbed, pipeline = bundled(), load_pipeline(spec.base)
        ids = [member.id for member in testbed.members]
        files = [testbed.file(member) for member in testbed.members]
        stack = Stack.of(files, [spec.scale] * len(ids), ids)
        return cls(spec, testbed, pipeline, stack, _judge(pipeline))

    def draw(
        self, sets: Sequence[Names], method: Method, factor: float
    ) -> Float[Tensor, "sets images 3 height width"]:
        spec, ids = self.spec, self.stack.names
        places = tuple(tuple(ids.index(name) for name in names) for names in sets)
        noise = initial_noise(self.pipeline, range(spec.images)).repeat_interleave(len(sets), 0)
        scales = [factor * scale for scale in self.stack.scales]
        with compose(self.pipeline, self.stack, Together(method, places), scales):
            prompts = [spec.prompt] * len(noise)
            drawn = generate(self.pipeline, prompts, spec.guidance, spec.steps, noise=noise)
        return drawn.unflatten(0, (spec.images, len(sets))).transpose(0, 1)

    def record(self, name: str, method: Method, factor: float, size: int) -> CompositionRecord:
        chosen = self.testbed.sets(size) if size > 1 else [(m,) for m in self.testbed.members]
        sets = tuple(tuple(member.id for member in one) for one in chosen)
        shown = []
        for k in range(0, len(sets), AT_ONCE):
            part = sets[k : k + AT_ONCE]
            for names, pictures in zip(part, self.draw(part, method, factor), strict=True):
                columns = [self.judge.shown(pictures, one) for one in names]
                shown.append(tuple(map(tuple, np.stack(columns, axis=1).tolist())))
        return CompositionRecord(name, size, sets, tuple(shown))


def run_composition(spec: CompositionSpec, out: Path) -> Path:
    """Compose, draw, judge and report; what has been judged is not judged again.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    records = Records(out, spec, CompositionRecord)
    done = {record.key: record for record in records.held}
    jobs = list(_jobs(spec))
    bench = _Bench.of(spec)
    with progress(
        "composition", len(jobs), sum((job[0], job[3]) in done for job in jobs)
    ) as advance:
        for name, method, factor, size in jobs:
            if (name, size) in done:
                continue
            record = bench.record(name, method, factor, size)
            records.append(record)
            done[record.key] = record
            advance()
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    write_report(folder, spec.title, _sections(bench, done, folder))
    return folder


def _jobs(spec: CompositionSpec) -> Iterator[tuple[str, Method, float, int]]:
    for size in (1, *spec.sizes):
        for name, (method, factor) in METHODS.items():
            if size > 1 or name in (NONE, MERGE):
                yield name, method, factor, size
    for tau in spec.taus:
        yield _switch(tau), Switch(tau), 1.0, spec.tau_size


def _switch(tau: int) -> str:
    return f"switch, tau {tau}"


def _judge(pipeline: Any) -> ElementJudge:
    pictures, digits = digit_pictures(image_size(pipeline))

    def through(pictures: Tensor) -> Tensor:
        return decode_latents(pipeline, encode_images(pipeline, pictures))

    return ElementJudge.train(pictures, [NAMES[k] for k in digits], through)


Done = Mapping[tuple[str, int], CompositionRecord]


def _sections(bench: _Bench, done: Done, folder: Path) -> list[Section]:
    spec, judge = bench.spec, bench.judge
    right = ", ".join(f"{100 * share:.1f} % ({name})" for name, share in judge.accuracy.items())
    counts = ", ".join(f"{len(done[MERGE, n].sets)} of {n}" for n in spec.sizes)
    intro = (
        f"Eleven adapters of {spec.base} in the five categories of ComposLoRA, made for this, and "
        f"every set of them: {counts}. {spec.images} pictures a set and method, `{spec.prompt}`, "
        f"scale {spec.scale:g}, {spec.steps} steps, guidance {spec.guidance:g}, the same noise for "
        "all. An element counts as shown when a support-vector machine finds it; on rendered "
        f"digits it has not seen, all elements mixed at random, the machines are right on {right}."
    )
    pictures = _pictures(bench, folder / "pictures.png")
    single = Section("Each adapter alone", (_single_grid(done),))
    tables = (_shares_grid(spec, done), _all_grid(spec, done), _category_grid(bench, done))
    return [
        Section("What this is", (intro,)),
        Section("Elements shown", (*tables, _wins_grid(spec, done))),
        Section("Turns of Switch", _tau_parts(spec, done, folder)),
        Section("Pictures", (pictures,)),
        single,
        published_section(
            spec.source,
            spec.published,
            "CLIPScore and a vision model's judgement are not measured here: both need models that "
            "are not bundled; see lora_ws.composition.clip_score and .endpoint.",
        ),
    ]


def _columns(columns: Mapping[str, Sequence[tuple[float, str]]], caption: str) -> Grid:
    """A row a method, the best of each column marked."""
    ranks = [ranked([v for v, _ in column], [t for _, t in column]) for column in columns.values()]
    rows = zip((Cell(name) for name in METHODS), *ranks, strict=True)
    return Grid(("method", *columns), tuple(rows), caption)


def _shares_grid(spec: CompositionSpec, done: Done) -> Grid:
    columns: dict[str, list[tuple[float, str]]] = {}
    for size in spec.sizes:
        pairs = [done[name, size].share for name in METHODS]
        columns[f"n = {size}"] = [(mean, f"{mean:.1f} ± {error:.1f}") for mean, error in pairs]
    means = [float(np.mean([done[m, n].share[0] for n in spec.sizes])) for m in METHODS]
    columns["mean"] = [(mean, f"{mean:.1f}") for mean in means]
    return _columns(
        columns, "Elements of the set that are shown, percent, ± standard error over sets."
    )


def _all_grid(spec: CompositionSpec, done: Done) -> Grid:
    def share(name: str, size: int) -> tuple[float, str]:
        value = 100 * float(done[name, size].array.all(axis=2).mean())
        return value, f"{value:.1f}"

    columns = {f"n = {size}": [share(name, size) for name in METHODS] for size in spec.sizes}
    return _columns(columns, "Pictures that show every element of their set, percent.")


def _category_grid(bench: _Bench, done: Done) -> Grid:
    def share(method: str, category: str) -> tuple[float, str]:
        hits = [
            hit
            for size in bench.spec.sizes
            for names, shown in zip(done[method, size].sets, done[method, size].array, strict=True)
            for name, column in zip(names, shown.T, strict=True)
            if ELEMENTS[name].category == category
            for hit in column
        ]
        return 100 * float(np.mean(hits)), f"{100 * float(np.mean(hits)):.1f}"

    columns = {c: [share(m, c) for m in METHODS] for c in bench.judge.machines}
    return _columns(columns, "Elements that are shown, by category, all sets together, percent.")


def _wins_grid(spec: CompositionSpec, done: Done) -> Grid:
    rows = []
    for name in METHODS:
        if name == MERGE:
            continue
        cells = []
        for size in spec.sizes:
            ours, theirs = (done[key, size].array.sum(axis=2) for key in (name, MERGE))
            wins, losses = 100 * (ours > theirs).mean(), 100 * (ours < theirs).mean()
            cells.append(Cell(f"{wins:.0f} / {losses:.0f}"))
        rows.append((Cell(name), *cells))
    caption = (
        "Pairs from the same noise where the method shows more elements than merge / fewer, "
        "percent; the rest are ties."
    )
    return Grid(("method", *(f"n = {n}" for n in spec.sizes)), tuple(rows), caption)


def _single_grid(done: Done) -> Grid:
    with_, without = done[MERGE, 1], done[NONE, 1]
    rows = tuple(
        (Cell(names[0]), Cell(f"{100 * there.mean():.0f}"), Cell(f"{100 * none.mean():.0f}"))
        for names, there, none in zip(with_.sets, with_.array, without.array, strict=True)
    )
    caption = f"Pictures that show the element, percent, n = {with_.array.shape[1]} each."
    return Grid(("adapter", "with it", NONE), rows, caption)


def _tau_parts(spec: CompositionSpec, done: Done, folder: Path) -> tuple[str, Figure]:
    size = spec.tau_size
    points = {tau: done[_switch(tau), size].share for tau in spec.taus}
    chance = done[NONE, size].share[0]
    chart = chart_lines(
        {"switch": points},
        folder / "tau.png",
        chance=chance,
        xlabel="steps of a turn (tau)",
        ylabel="elements shown, percent",
        guess=NONE,
    )
    best = max(points, key=lambda tau: points[tau][0])
    text = (
        f"Sets of {size}, {spec.steps} steps. The best turn here has {best} steps; the paper's, 5 "
        "of 100 to 200. With turns of a third of all steps or more the last adapters hardly act."
    )
    return text, Figure(chart, "Elements shown by the length of a turn; the band is ± an error.")


def _pictures(bench: _Bench, file: Path) -> Figure:
    """The same set of five by every method."""
    (names,) = [tuple(m.id for m in one) for one in bench.testbed.sets(5)][-1:]
    many = replace(bench, spec=replace(bench.spec, images=SHOWN))
    rows = [many.draw([names], method, factor)[0] for method, factor in METHODS.values()]
    labels = list(METHODS)
    picture = save_grid(torch.cat(rows), SHOWN, file, 5, labels)
    return Figure(picture, f"The set {', '.join(names)}; a column is the same noise.")
