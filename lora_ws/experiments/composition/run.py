"""Compose sets of adapters by every method, and judge whether each element can be seen."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.composition.elements import ElementJudge
from lora_ws.composition.testbed import Testbed, bundled
from lora_ws.diffusion.digits import NAMES, digit_pictures
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.hooks import compose
from lora_ws.diffusion.methods import BatchedSets, Method, Switch
from lora_ws.diffusion.pipeline import (
    decode_latents,
    encode_images,
    generate,
    image_size,
    load_pipeline,
)
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.diffusion.turns import AdaptiveSwitch
from lora_ws.experiments.composition.report import (
    PICTURES,
    SHOWN,
    composition_sections,
    shown_prompts,
    shown_set,
)
from lora_ws.experiments.composition.spec import (
    MERGE,
    METHODS,
    NONE,
    CompositionRecord,
    CompositionSpec,
    CostRecord,
    Key,
    Kind,
    Names,
    named_sizes,
    turns_named,
)
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import Records
from lora_ws.report.images import save_grid
from lora_ws.report.page import write_report

# Sets drawn in one batch, images of an adapter alone, and runs of which the median is a cost.
AT_ONCE, ALONE, RUNS = 24, 16, 3
COSTS = "costs.jsonl"


@dataclass(frozen=True, eq=False)
class _Sampler:
    """Draws sets of adapters and judges the images."""

    spec: CompositionSpec
    testbed: Testbed
    pipeline: Any
    stack: AdapterStack
    judge: ElementJudge
    # Of images that may show both styles.
    both: ElementJudge

    @classmethod
    def of(cls, spec: CompositionSpec) -> "_Sampler":
        testbed, pipeline = bundled(), load_pipeline(spec.base)
        ids = [member.id for member in testbed.members]
        files = [testbed.file(member) for member in testbed.members]
        stack = AdapterStack.of(files, names=ids)
        return cls(spec, testbed, pipeline, stack, _judge(pipeline), _judge(pipeline, "style"))

    def draw(
        self, sets: Sequence[Names], prompts: Sequence[Sequence[str]], method: Method, factor: float
    ) -> Float[Tensor, "sets images 3 height width"]:
        """Images of sets at once: a prompt each, the same noise for every set."""
        ids, images = self.stack.names, len(prompts[0])
        places = tuple(tuple(ids.index(name) for name in names) for names in sets)
        # Sample j is of set j modulo their number.
        seeds = [image for image in range(images) for _ in sets]
        every = tuple(own[image] for image in range(images) for own in prompts)
        method = BatchedSets(self._fitted(method, every, seeds), places)
        with compose(self.pipeline, self.stack, method, [factor] * len(ids)):
            drawn = generate(self.pipeline, self._generation(every), seeds=seeds)
        return drawn.unflatten(0, (images, len(sets))).transpose(0, 1)

    def _fitted(self, method: Method, prompts: Sequence[str], seeds: Sequence[int]) -> Method:
        """A method with what it measures of the base, each image of which counts once."""
        every, noise = zip(*dict.fromkeys(zip(prompts, seeds, strict=True)), strict=True)
        return method.fitted(self.pipeline, self._generation(every), noise)

    def _generation(self, prompts: tuple[str, ...]) -> GenerationSpec:
        return GenerationSpec(
            prompts,
            guidance_scale=self.spec.guidance,
            num_inference_steps=self.spec.steps,
        )

    def record(
        self, name: str, method: Method, factor: float, size: int, kind: Kind
    ) -> CompositionRecord:
        """Draw and judge every set of a size."""
        spec, sets = self.spec, self.sets(size, kind)
        judge = self.both if kind == "styles" else self.judge
        images = {"styles": spec.both_images}.get(kind, spec.images if size > 1 else ALONE)
        shown, kept = [], []
        for k in range(0, len(sets), AT_ONCE):
            part = sets[k : k + AT_ONCE]
            digits = [[NAMES[(n + i) % 10] for i in range(spec.digits)] for n in range(len(part))]
            prompts = [[spec.named.format(digit) for digit in own] for own in digits]
            prompts = prompts if kind == "named" else [[spec.prompt] * images] * len(part)
            drawn = self.draw(part, prompts, method, factor)
            for names, own, pictures in zip(part, digits, drawn, strict=True):
                columns = [judge.shown(pictures, one) for one in names]
                shown.append(tuple(map(tuple, np.stack(columns, axis=1).tolist())))
                if kind == "named":
                    seen = judge.digits(pictures)
                    kept.append(tuple(a == b for a, b in zip(seen, own, strict=True)))
        return CompositionRecord(name, size, kind, sets, tuple(shown), tuple(kept))

    def cost(self, name: str, size: int) -> CostRecord:
        """What drawing takes with one set, everything but loading and judging."""
        rows: list[int] = []
        handle = self.pipeline.unet.register_forward_hook(
            lambda _, __, output: rows.append(len(output[0]))
        )
        one = self.sets(size, "character")[:1]
        draw = partial(self.draw, one, [[self.spec.prompt] * self.spec.cost_images], *METHODS[name])
        try:
            draw()
            rows.clear()
            seconds = [_seconds(draw) for _ in range(RUNS)]
        finally:
            handle.remove()
        calls, every = len(rows) // RUNS, sum(rows) // RUNS
        return CostRecord(name, size, calls, every, round(median(seconds), 4))

    def sets(self, size: int, kind: Kind) -> tuple[Names, ...]:
        """Ids of every set of a kind, in the order of turns; of one, every adapter alone."""
        if size == 1:
            return tuple((member.id,) for member in self.testbed.members)
        if kind == "styles":
            # Another style beside that of a set of one fewer.
            pair = [member.id for member in self.testbed.members if member.category == "style"]
            plain = self.sets(size - 1, "character")
            return tuple(
                tuple(other for one in names for other in (pair if one == pair[0] else [one]))
                for names in plain
                if pair[0] in names
            )
        sets = self.testbed.sets(size + (kind == "named"))
        first = sets[0][0]
        sets = [one[1:] for one in sets if one[0] == first] if kind == "named" else sets
        return tuple(tuple(member.id for member in one) for one in sets)


def _seconds(draw: Callable[[], Any]) -> float:
    begun = time.process_time()
    draw()
    return time.process_time() - begun


def run(spec: CompositionSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    records = Records(options.out, spec, CompositionRecord)
    costs = Records(options.out, spec, CostRecord, COSTS)
    sampler = _Sampler.of(spec)
    jobs: dict[Key, Callable[[], CompositionRecord]] = {
        Key(name, size, kind): partial(sampler.record, name, *how, size, kind)
        for name, how, size, kind in _jobs(spec)
    }
    measured = {
        (name, size): partial(sampler.cost, name, size) for name in METHODS for size in spec.sizes
    }
    taken = costs.complete(f"{options.name}: costs", measured)
    done = records.complete(options.name, jobs)
    folder = options.out / "report"
    for named, file in PICTURES.items():
        names = shown_set(spec, done, named)
        rows = [
            sampler.draw([names], [shown_prompts(spec, named)], *how)[0] for how in METHODS.values()
        ]
        save_grid(torch.cat(rows), SHOWN, folder / file, 5, list(METHODS))
    accuracy = {**sampler.judge.accuracy, "both styles at once": sampler.both.accuracy["style"]}
    sections = composition_sections(spec, done, taken, accuracy, folder)
    write_report(folder, spec.title, sections)
    return folder


def _jobs(spec: CompositionSpec) -> Iterator[tuple[str, tuple[Method, float], int, Kind]]:
    """Name of a record, method and factor of its scales, size and kind of the sets."""
    for name, how in METHODS.items():
        if name in (NONE, MERGE):
            yield name, how, 1, "character"
        for size in spec.sizes:
            yield name, how, size, "character"
        for size in named_sizes(spec):
            yield name, how, size, "named"
        for size in spec.both_sizes:
            yield name, how, size, "styles"
    turns = *map(Switch, spec.taus), *map(AdaptiveSwitch, spec.adaptive)
    for method in turns:
        yield turns_named(method), (method, 1.0), spec.tau_size, "character"


def _judge(pipeline: Any, together: str = "") -> ElementJudge:
    pictures, digits = digit_pictures(image_size(pipeline))

    def through(pictures: Tensor) -> Tensor:
        return decode_latents(pipeline, encode_images(pipeline, pictures))

    return ElementJudge.train(pictures, [NAMES[k] for k in digits], through, together=together)
