"""Sets of adapters composed by every method, judged by whether each element can be seen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.composition.elements import ElementJudge
from lora_ws.composition.testbed import Testbed, bundled
from lora_ws.diffusion.digits import NAMES, digit_pictures
from lora_ws.diffusion.hooks import compose
from lora_ws.diffusion.methods import BatchedSets, Method, Switch
from lora_ws.diffusion.pipeline import (
    decode_latents,
    encode_images,
    generate,
    image_size,
    initial_noise,
    load_pipeline,
)
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.experiments.composition_report import sections
from lora_ws.experiments.composition_spec import (
    MERGE,
    METHODS,
    NONE,
    CompositionRecord,
    CompositionSpec,
    Names,
    named_sizes,
    switch_named,
)
from lora_ws.experiments.quoted import published_section
from lora_ws.experiments.records import Records
from lora_ws.report.images import save_grid
from lora_ws.report.page import Figure, Section, write_report
from lora_ws.report.progress import progress

# Sets drawn in one batch, pictures of an adapter alone, and pictures shown of a set.
AT_ONCE, ALONE, SHOWN = 24, 16, 8
NOT_MEASURED = (
    "CLIPScore and a vision model's judgement are not measured here: both need models that are not "
    "bundled; see lora_ws.composition.clip_score and .endpoint."
)


@dataclass(frozen=True, eq=False)
class _Bench:
    """What pictures are made and judged with."""

    spec: CompositionSpec
    testbed: Testbed
    pipeline: Any
    stack: AdapterStack
    judge: ElementJudge

    @classmethod
    def of(cls, spec: CompositionSpec) -> "_Bench":
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
        noise = initial_noise(self.pipeline, range(images)).repeat_interleave(len(sets), 0)
        # Sample j is of set j modulo their number.
        said = [own[image] for image in range(images) for own in prompts]
        with compose(self.pipeline, self.stack, BatchedSets(method, places), [factor] * len(ids)):
            drawn = generate(self.pipeline, said, spec.guidance, spec.steps, noise=noise)
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
    left = [job for job in jobs if (job[0], job[3], job[4]) not in done]
    with progress("composition", len(jobs), len(jobs) - len(left)) as advance:
        for job in left:
            record = bench.record(*job)
            records.append(record)
            done[record.key] = record
            advance()
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    accuracy = bench.judge.accuracy
    figures = [_picture(bench, folder, named) for named in (False, True)]
    published = published_section(spec.source, spec.published, NOT_MEASURED)
    more = sections(spec, done, accuracy, folder)
    write_report(folder, spec.title, [*more, Section("Pictures", tuple(figures)), published])
    return folder


def _picture(bench: _Bench, folder: Path, named: bool) -> Figure:
    """The last of the largest sets by every method."""
    spec = bench.spec
    names = bench.sets(max(named_sizes(spec) if named else spec.sizes), named)[-1]
    prompts = [spec.named.format(digit) if named else spec.prompt for digit in NAMES[:SHOWN]]
    rows = [bench.draw([names], [prompts], *how)[0] for how in METHODS.values()]
    file = folder / ("named.png" if named else "pictures.png")
    said = f"`{prompts[0]}` to `{prompts[-1]}`" if named else f"`{spec.prompt}`"
    picture = save_grid(torch.cat(rows), SHOWN, file, 5, list(METHODS))
    return Figure(picture, f"{', '.join(names)}; {said}; the same noise in every column.")


def _jobs(spec: CompositionSpec) -> Iterator[tuple[str, Method, float, int, bool]]:
    for name, (method, factor) in METHODS.items():
        if name in (NONE, MERGE):
            yield name, method, factor, 1, False
        for size in spec.sizes:
            yield name, method, factor, size, False
        for size in named_sizes(spec):
            yield name, method, factor, size, True
    for tau in spec.taus:
        yield switch_named(tau), Switch(tau), 1.0, spec.tau_size, False


def _judge(pipeline: Any) -> ElementJudge:
    pictures, digits = digit_pictures(image_size(pipeline))

    def through(pictures: Tensor) -> Tensor:
        return decode_latents(pipeline, encode_images(pipeline, pictures))

    return ElementJudge.train(pictures, [NAMES[k] for k in digits], through)
