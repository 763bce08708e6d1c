"""Compose sets of adapters by every method, and judge whether each element can be seen."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    Key,
    Names,
    named_sizes,
    switch_named,
)
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import Records
from lora_ws.report.images import save_grid
from lora_ws.report.page import write_report

# Sets drawn in one batch, and pictures of an adapter alone.
AT_ONCE, ALONE = 24, 16


@dataclass(frozen=True, eq=False)
class _Sampler:
    """Draws sets of adapters and judges the pictures."""

    spec: CompositionSpec
    testbed: Testbed
    pipeline: Any
    stack: AdapterStack
    judge: ElementJudge

    @classmethod
    def of(cls, spec: CompositionSpec) -> "_Sampler":
        testbed, pipeline = bundled(), load_pipeline(spec.base)
        ids = [member.id for member in testbed.members]
        files = [testbed.file(member) for member in testbed.members]
        stack = AdapterStack.of(files, names=ids)
        return cls(spec, testbed, pipeline, stack, _judge(pipeline))

    def draw(
        self, sets: Sequence[Names], prompts: Sequence[Sequence[str]], method: Method, factor: float
    ) -> Float[Tensor, "sets images 3 height width"]:
        """Pictures of sets at once: a prompt each, the same noise for every set."""
        spec, ids, images = self.spec, self.stack.names, len(prompts[0])
        places = tuple(tuple(ids.index(name) for name in names) for names in sets)
        # Sample j is of set j modulo their number.
        seeds = [image for image in range(images) for _ in sets]
        generation = GenerationSpec(
            tuple(own[image] for image in range(images) for own in prompts),
            guidance_scale=spec.guidance,
            num_inference_steps=spec.steps,
        )
        with compose(self.pipeline, self.stack, BatchedSets(method, places), [factor] * len(ids)):
            drawn = generate(self.pipeline, generation, seeds=seeds)
        return drawn.unflatten(0, (images, len(sets))).transpose(0, 1)

    def record(
        self, name: str, method: Method, factor: float, size: int, named: bool
    ) -> CompositionRecord:
        """Draw and judge every set of a size."""
        spec, sets = self.spec, self.sets(size, named)
        shown, kept = [], []
        for k in range(0, len(sets), AT_ONCE):
            part = sets[k : k + AT_ONCE]
            digits = [[NAMES[(n + i) % 10] for i in range(spec.digits)] for n in range(len(part))]
            prompts = [[spec.named.format(digit) for digit in own] for own in digits]
            images = spec.images if size > 1 else ALONE
            prompts = prompts if named else [[spec.prompt] * images] * len(part)
            drawn = self.draw(part, prompts, method, factor)
            for names, own, pictures in zip(part, digits, drawn, strict=True):
                columns = [self.judge.shown(pictures, one) for one in names]
                shown.append(tuple(map(tuple, np.stack(columns, axis=1).tolist())))
                if named:
                    seen = self.judge.digits(pictures)
                    kept.append(tuple(a == b for a, b in zip(seen, own, strict=True)))
        return CompositionRecord(name, size, sets, tuple(shown), tuple(kept))

    def sets(self, size: int, named: bool) -> tuple[Names, ...]:
        """Ids of every set: with a character, without one where prompts name a digit, or of one."""
        if size == 1:
            return tuple((member.id,) for member in self.testbed.members)
        sets = self.testbed.sets(size + named)
        first = sets[0][0]
        sets = [one[1:] for one in sets if one[0] == first] if named else sets
        return tuple(tuple(member.id for member in one) for one in sets)


def run(spec: CompositionSpec, options: Options) -> Path:
    """Measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: the folder holds another experiment.
    """
    records = Records(options.out, spec, CompositionRecord)
    sampler = _Sampler.of(spec)
    jobs: dict[Key, Callable[[], CompositionRecord]] = {
        (name, size, named): partial(sampler.record, name, *how, size, named)
        for name, how, size, named in _jobs(spec)
    }
    done = records.complete(options.name, jobs)
    folder = options.out / "report"
    for named, file in PICTURES.items():
        names = shown_set(spec, done, named)
        rows = [
            sampler.draw([names], [shown_prompts(spec, named)], *how)[0] for how in METHODS.values()
        ]
        save_grid(torch.cat(rows), SHOWN, folder / file, 5, list(METHODS))
    sections = composition_sections(spec, done, sampler.judge.accuracy, folder)
    write_report(folder, spec.title, sections)
    return folder


def _jobs(spec: CompositionSpec) -> Iterator[tuple[str, tuple[Method, float], int, bool]]:
    """Name of a record, method and factor of its scales, size of the sets, digits named or not."""
    for name, how in METHODS.items():
        if name in (NONE, MERGE):
            yield name, how, 1, False
        for size in spec.sizes:
            yield name, how, size, False
        for size in named_sizes(spec):
            yield name, how, size, True
    for tau in spec.taus:
        yield switch_named(tau), (Switch(tau), 1.0), spec.tau_size, False


def _judge(pipeline: Any) -> ElementJudge:
    pictures, digits = digit_pictures(image_size(pipeline))

    def through(pictures: Tensor) -> Tensor:
        return decode_latents(pipeline, encode_images(pipeline, pictures))

    return ElementJudge.train(pictures, [NAMES[k] for k in digits], through)
