"""SDXL, SD3 and FLUX.1 with every scheduler, against diffusers' own pipelines, in float64.

The pipelines run one image at a time, and call copies of the denoiser with merged weights; they
know nothing of banks or of batches of mixtures.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from every_scheduler import (
    FLOW_KINDS,
    KINDS,
    OTHERS,
    Kind,
    alike,
    by_scheduler,
    flow_built,
    known_levels,
)
from merged import Merged
from tiny_pipelines import TARGETS, make
from tolerances import EXACT, rounding
from torch import Tensor

from lora_ws.attribution.ablation import ablate, draw_subsets
from lora_ws.attribution.shapley import shapley
from lora_ws.concepts.objective import amplify_objective, erase_objective
from lora_ws.diffusion import Composite, Switch, compose
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.families import denoiser_of, family_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import Merge, Method
from lora_ws.diffusion.pipeline import adapter_layout, denoise, generate, initial_noise
from lora_ws.diffusion.schedulers import timesteps_for
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

STEPS, GUIDANCE, SEEDS = 4, 2.0, (3, 4)
SPEC = GenerationSpec("cat", seed=3, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
# The last adapter is of random numbers too, and at scale 0.
SCALES = (0.8, 0.5, 0.0)
CASES = [
    *(("sdxl", kind) for kind in KINDS),
    *((family, kind) for family in ("sd3", "flux-dev") for kind in FLOW_KINDS),
]
# Schedulers that are not told how far FLUX.1 shifts their noise levels.
REFUSED = (
    "DPMSolverMultistepInverseScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "SASolverScheduler",
)
DRAWN = [
    (family, kind) for family, kind in CASES if family != "flux-dev" or kind.name not in REFUSED
]
every_case = pytest.mark.parametrize(
    ("family", "kind"), DRAWN, ids=[f"{family}-{kind}" for family, kind in DRAWN]
)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Base(NamedTuple):
    """A pipeline for ours, one for theirs, adapters, and copies with their weights merged."""

    ours: Any
    theirs: Any
    stack: AdapterStack
    merged: Merged
    own: Any


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return {family: _base(family) for family in ("sdxl", "sd3", "flux-dev")}


def _base(family: str) -> Base:
    ours, theirs = (make(family) for _ in range(2))
    for pipeline in (ours, theirs):
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.double()
    denoiser = denoiser_of(ours)
    targets = TARGETS["unet" if family == "sdxl" else "transformer"]
    layout = adapter_layout(denoiser, 2, targets)
    rows = 0.3 * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0)).double()
    bank = AdapterBank.from_rows(rows, layout, dtype=torch.float64)
    stack = AdapterStack(("a", "b", "off"), bank, SCALES)
    return Base(ours, theirs, stack, Merged(denoiser, stack), ours.scheduler.config)


@pytest.fixture
def base(bases: dict[str, Base], family: str, kind: Kind) -> Base:
    found = bases[family]
    found.ours.scheduler = kind.build(found.own)
    return found


class Plain(NamedTuple):
    """What diffusers' pipeline went through: calls of the denoiser, latents, and the image."""

    calls: list[tuple[dict[str, Any], Tensor]]
    latents: Tensor
    image: Tensor


Models = Callable[[int, int], Sequence[Any]]


def plain(base: Base, kind: Kind, models: Models, seed: int = 3) -> Plain:
    """One image by diffusers' pipeline, whose denoiser is the mean of models at each step."""
    pipeline, family = base.theirs, family_of(base.theirs)
    scheduler = pipeline.scheduler = kind.build(base.own)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *family.latent_shape(), generator=generator).double()
    if family.component == "transformer":
        scheduler.step = seeded(pipeline, generator)
    calls: list[tuple[dict[str, Any], Tensor]] = []
    kept: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        names = inspect.signature(type(denoiser).forward).parameters
        told = {**dict(zip(list(names)[1:], args, strict=False)), **kwargs, "return_dict": False}
        every = models(len(kept), len(scheduler.timesteps))
        mean = torch.stack([model(**told)[0] for model in every]).mean(0)
        calls.append((told, mean))
        return (mean,)

    def after(_: Any, __: int, ___: Any, known: dict[str, Any]) -> dict[str, Any]:
        kept.append(known["latents"])
        return known

    denoiser = denoiser_of(pipeline)
    denoiser.forward = forward
    try:
        image = pipeline(
            "cat",
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            latents=family.packed(noise),
            generator=generator,
            height=family.image_size,
            width=family.image_size,
            output_type="pt",
            callback_on_step_end=after,
        ).images
    finally:
        del denoiser.forward
    return Plain(calls, kept[-1], image[0] * 2 - 1)


def seeded(pipeline: Any, generator: torch.Generator) -> Callable[..., tuple[Tensor]]:
    """Steps that draw from a generator: the pipelines of transformers give them none.

    FLUX.1 steps on patches, whose noise would be in another order.
    """
    step, side = pipeline.scheduler.step, family_of(pipeline).image_size
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(step).parameters:
        options["generator"] = generator

    def draw(said: Tensor, time: Tensor, latents: Tensor, **_: Any) -> tuple[Tensor]:
        if latents.ndim == 4:
            return (step(said, time, latents, **options)[0],)
        unpacked = (
            pipeline._unpack_latents(x, side, side, pipeline.vae_scale_factor)
            for x in (said, latents)
        )
        said, latents = unpacked
        found = step(said, time, latents, **options)[0]
        return (pipeline._pack_latents(found, *found.shape),)

    return draw


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=EXACT, rtol=EXACT)


def close_images(one: Tensor, other: Tensor) -> None:
    """Ours are float32, from -1 to 1."""
    atol = 2 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(one.double(), other, atol=atol, rtol=0)


@every_case
def test_composing_is_diffusers_pipeline_with_merged_weights(
    family: str, kind: Kind, base: Base
) -> None:
    one, other, both, none = (base.merged[on] for on in ((0,), (1,), (0, 1), ()))
    ways: dict[Method, Models] = {
        Merge(): lambda n, count: [both],
        Composite((1, 1, 0)): lambda n, count: [one, other],
        Switch(1): lambda n, count: [(one, other, none)[n % 3]],
    }
    for method, models in ways.items():
        runs = [plain(base, kind, models, seed) for seed in SEEDS]
        with compose(base.ours, base.stack, method):
            drawn = generate(base.ours, SPEC, images=2)
            *_, latents = denoise(base.ours, initial_noise(base.ours, SEEDS), SPEC)
        expected = torch.cat([run.latents for run in runs])
        close(family_of(base.ours).packed(latents), expected)
        close_images(drawn, torch.stack([run.image for run in runs]))


@every_case
def test_ablation_shapley_and_late_starts_are_diffusers_pipeline_with_merged_weights(
    family: str, kind: Kind, base: Base
) -> None:
    merged, stack, start = base.merged, base.stack, 2

    def alone(on: tuple[int, ...]) -> Tensor:
        return plain(base, kind, lambda n, count: [merged[on]]).image

    full, none, first, second = (alone(on) for on in ((0, 1), (), (0,), (1,)))
    found = ablate(base.ours, stack, SPEC)
    for mine, wanted in ((found.full, full), (found.base, none), (found.leave_one_out[0], second)):
        close_images(mine, wanted)
    assert float(found.effects[0]) > 1e-3
    assert float(found.effects[2]) == 0

    def worth(rows: np.ndarray) -> np.ndarray:
        images = draw_subsets(base.ours, stack, SPEC, torch.from_numpy(rows))
        return (images - found.base).abs().mean(dim=(1, 2, 3)).numpy()

    one, two, both = (float((image - none).abs().mean()) for image in (first, second, full))
    wanted = [(one + both - two) / 2, (two + both - one) / 2, 0]
    assert shapley(worth, 3).values == pytest.approx(wanted, abs=rounding(1))

    def late(on: tuple[int, ...]) -> Tensor:
        return plain(base, kind, lambda n, count: [merged[(0, 1) if n < start else on]]).image

    from_there = ablate(base.ours, stack, SPEC, start=start)
    close_images(from_there.full, full)
    close_images(from_there.base, late(()))
    close_images(from_there.leave_one_out[0], late((1,)))
    assert float(from_there.effects[2]) == 0


@every_case
def test_what_erasing_measures_is_what_the_pipeline_gave_its_denoiser(
    family: str, kind: Kind, base: Base
) -> None:
    model, pack = base.merged[()], family_of(base.ours).packed
    calls = [plain(base, kind, lambda n, count: [model], seed).calls for seed in SEEDS]
    found = erase_objective(base.ours, "cat", seeds=SEEDS, steps=STEPS, guidance_scale=GUIDANCE)
    name = "sample" if family == "sdxl" else "hidden_states"
    inputs = [told[name][:1] for pair in zip(*calls, strict=True) for told, _ in pair]
    close(pack(found.latents), torch.cat(inputs))
    value = 0.0
    for told, said in (call for one in calls for call in one):
        if family == "flux-dev":
            text, pooled, _ = base.theirs.encode_prompt("", None)
            other = {"encoder_hidden_states": text, "pooled_projections": pooled}
            said = torch.cat([model(**{**told, **other})[0], said])
        without, asked = said.chunk(2)
        value += float((asked - without).square().sum())
    # Sums of J are float32.
    bound = rounding(found.latents.numel())
    assert found.value(denoiser_of(base.ours)) == pytest.approx(value, rel=bound)


@every_case
def test_training_is_what_the_scheduler_says(family: str, kind: Kind, base: Base) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    if kind.name in OTHERS:
        with pytest.raises(ConfigError, match=f"{kind.name} does not say the noise levels"):
            amplify_objective(base.ours, "cat", images, steps=STEPS)
        return
    objective = amplify_objective(base.ours, "cat", images, steps=STEPS)
    against: Any = objective.against
    config = base.ours.vae.config
    clean = base.ours.vae.encode(images).latent_dist.mode() - (config.shift_factor or 0)
    clean = (clean * config.scaling_factor).repeat(len(objective.times) // 2, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).double()
    if family == "sdxl":
        inputs, targets = by_scheduler(kind, clean, noise, 2, STEPS, base.own)
        known = known_levels(kind, objective.times)
        alike(objective.latents[known], inputs[known])
        alike(against[known], targets[known])
        return
    # The model is told times, of which some schedulers drop what is behind the point.
    levels = (objective.times / 1000).double()
    close(against, noise - clean)
    close(objective.latents, torch.lerp(clean, noise, levels[:, None, None, None]))
    told = replace(SPEC, guidance_scale=1.0)
    times = timesteps_for(base.ours, told)
    sigmas = base.ours.scheduler.sigmas.double()
    nearest = (times[:, None] / 1000 - sigmas).abs().min(dim=1).values
    assert float(nearest.max()) < 1e-3


@pytest.mark.parametrize("kind", [kind for kind in FLOW_KINDS if kind.name in REFUSED], ids=str)
@pytest.mark.parametrize("family", ["flux-dev"])
def test_schedulers_that_cannot_be_shifted_are_refused(family: str, kind: Kind, base: Base) -> None:
    with pytest.raises(ConfigError, match=f"{kind.name} cannot make {STEPS} steps"):
        ablate(base.ours, base.stack, SPEC)


# They sample in stages, in a pipeline of their own.
STAGED = {"HeliosDMDScheduler", "HeliosScheduler"}


def test_every_scheduler_of_flow_is_drawn_with_or_refused(bases: dict[str, Base]) -> None:
    base = bases["sd3"]
    built = flow_built(base.own)
    assert built - STAGED == {kind.name for kind in FLOW_KINDS}
    for name in STAGED & built:
        base.ours.scheduler = Kind(name).build(base.own)
        with pytest.raises(ConfigError, match=f"{name} cannot make {STEPS} steps"):
            timesteps_for(base.ours, SPEC)
