"""Every scheduler that diffusers can build, against loops by hand with merged weights, in float64.

The loops know nothing of banks, batches of mixtures, or of how steps are counted: one image, one
copy of the U-Net per mixture, a scheduler and a generator as diffusers' documentation has them.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
    StableDiffusionImg2ImgPipeline,
)
from every_scheduler import (
    BUILT,
    KINDS,
    OTHERS,
    REFUSED,
    Kind,
    alike,
    by_scheduler,
    known_levels,
)
from merged import Merged
from tolerances import EXACT, rounding
from torch import Tensor

from lora_ws.attribution.ablation import ablate, draw_subsets
from lora_ws.attribution.boxes import renoise
from lora_ws.attribution.shapley import shapley, subsets_of
from lora_ws.attribution.trajectory import record, trajectory
from lora_ws.concepts.objective import amplify_objective, erase_objective
from lora_ws.diffusion import Composite, Schedule, Switch, compose
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import Merge, Method
from lora_ws.diffusion.pipeline import (
    PipelineSize,
    adapter_layout,
    build_pipeline,
    decode_latents,
    denoise,
    generate,
    initial_noise,
)
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.diffusion.schedulers import Clock, timesteps_of
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError

SIZE = PipelineSize(8, (8, 8), (8, 8), 1, 1, 2, 8, 1, norm_groups=4)
STEPS, GUIDANCE, SEED = 4, 2.0, 3
SPEC = GenerationSpec(
    "a photo of cat", seed=SEED, num_inference_steps=STEPS, guidance_scale=GUIDANCE
)
# The last adapter is of random numbers too, and at scale 0.
SCALES = (0.8, 0.5, 0.0)
EVERYONE = frozenset({0, 1})


every_scheduler = pytest.mark.parametrize("kind", KINDS, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def _pipeline() -> Any:
    pipeline = build_pipeline(SIZE, ["cat"])
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.double().requires_grad_(False)
    return pipeline


@pytest.fixture
def pipeline(_pipeline: Any, kind: Kind) -> Any:
    _pipeline.scheduler = kind.build()
    return _pipeline


@pytest.fixture(scope="module")
def stack(_pipeline: Any) -> AdapterStack:
    layout = adapter_layout(_pipeline.unet, 2)
    rows = 0.3 * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0)).double()
    bank = AdapterBank.from_rows(rows, layout, dtype=torch.float64)
    return AdapterStack(("a", "b", "off"), bank, SCALES)


@pytest.fixture(scope="module")
def unets(_pipeline: Any, stack: AdapterStack) -> Merged:
    return Merged(_pipeline.unet, stack)


class Plain(NamedTuple):
    """What a loop by hand went through."""

    times: list[Tensor]
    inputs: list[Tensor]
    latents: Tensor


Models = Callable[[int, int], Sequence[Any]]


@torch.no_grad()
def plain(pipeline: Any, kind: Kind, models: Models, seed: int = SEED) -> Plain:
    """One image, by the mean of what models predict at a timestep, of so many."""
    scheduler = kind.build()
    scheduler.set_timesteps(STEPS)
    taken = inspect.signature(scheduler.step).parameters
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 4, 4, 4, generator=generator).double()
    latents = noise * scheduler.init_noise_sigma
    text = encode_prompts(pipeline, ["", "a photo of cat"])
    inputs, count = [], len(scheduler.timesteps)
    for number, time in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(latents, time))
        x, said = inputs[-1].repeat(2, 1, 1, 1), []
        for unet in models(number, count):
            without, asked = unet(x, time, encoder_hidden_states=text).sample.split(1)
            said.append(without + GUIDANCE * (asked - without))
        # Pipelines leave eta at 0.
        options = {"generator": generator, "eta": 0.0}
        options = {name: value for name, value in options.items() if name in taken}
        mean = torch.stack(said).mean(0)
        latents = scheduler.step(mean, time, latents, **options).prev_sample
    return Plain(list(scheduler.timesteps), inputs, latents)


def picture(pipeline: Any, run: Plain) -> Tensor:
    return decode_latents(pipeline, run.latents)[0]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=EXACT, rtol=EXACT)


def test_what_is_refused_is_refused_by_name_and_nothing_else_is() -> None:
    refused = [name for name in REFUSED if name in BUILT]
    for name in refused:
        with pytest.raises(ConfigError, match=f"scheduler: {name} .*{REFUSED[name]}"):
            timesteps_of(Kind(name).build(), STEPS)
    for kind in KINDS:
        assert len(timesteps_of(kind.build(), STEPS)) >= STEPS
    # What Stable Diffusion is drawn with.
    usual = ("DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete")
    usual += ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep")
    usual += ("DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "LCM", "TCD", "SASolver")
    assert {f"{name}Scheduler" for name in usual} <= {kind.name for kind in KINDS}


def test_a_pair_that_rounding_puts_in_the_other_order_begins_no_image() -> None:
    scheduler = Kind("KDPM2AncestralDiscreteScheduler").build()
    scheduler.timesteps = torch.tensor([999.0, 332.99997, 333.0, 0.0])
    clock = Clock(SimpleNamespace(scheduler=scheduler))
    times = [*scheduler.timesteps.tolist(), 999.0]
    assert [clock.at(time).number for time in times] == [0, 1, 2, 3, 0]


@pytest.mark.slow
@every_scheduler
def test_composing_is_a_loop_with_merged_weights(
    kind: Kind, pipeline: Any, stack: AdapterStack, unets: Merged
) -> None:
    one, other = unets[frozenset({0})], unets[frozenset({1})]
    ways: dict[Method, Models] = {
        Merge(): lambda n, count: [unets[EVERYONE]],
        Composite((1, 1, 0)): lambda n, count: [one, other],
        Switch(1): lambda n, count: [(one, other, unets[frozenset()])[n % 3]],
        Schedule(((0, 0.5), (0.5, 1), (0, 1))): lambda n, count: [(one, other)[n >= count / 2]],
    }
    for method, models in ways.items():
        expected = torch.cat([plain(pipeline, kind, models, seed).latents for seed in (3, 4)])
        with compose(pipeline, stack, method):
            drawn = generate(pipeline, SPEC, images=2)
            if method == Switch(1):
                *_, latents = denoise(pipeline, initial_noise(pipeline, [3, 4]), SPEC)
                close(latents, expected)
        # Images are float32, from -1 to 1.
        atol = 2 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(drawn, decode_latents(pipeline, expected), atol=atol, rtol=0)


@pytest.mark.slow
@every_scheduler
def test_ablation_and_shapley_are_loops_with_merged_weights(
    kind: Kind, pipeline: Any, stack: AdapterStack, unets: Merged
) -> None:
    subsets = torch.from_numpy(subsets_of(3))
    ons = [frozenset(row.nonzero()[:, 0].tolist()) & EVERYONE for row in subsets]
    made = {
        on: picture(pipeline, plain(pipeline, kind, lambda n, count, on=on: [unets[on]]))
        for on in set(ons)
    }
    drawn = draw_subsets(pipeline, stack, SPEC, subsets, batch=5)
    close(drawn, torch.stack([made[on] for on in ons]))

    ablation = ablate(pipeline, stack, SPEC, shown=3)
    close(ablation.full, made[EVERYONE])
    close(ablation.base, made[frozenset()])
    close(ablation.leave_one_out[0], made[frozenset({1})])
    assert float(ablation.effects[0]) > 1e-3
    assert float(ablation.effects[2]) == 0
    assert ablation.steps[-1] == len(pipeline.scheduler.timesteps)

    def worth(rows: np.ndarray) -> np.ndarray:
        images = draw_subsets(pipeline, stack, SPEC, torch.from_numpy(rows))
        return (images - ablation.base).abs().mean(dim=(1, 2, 3)).numpy()

    by_hand = {on: float((image - made[frozenset()]).abs().mean()) for on, image in made.items()}
    values = np.zeros(3)
    for order in itertools.permutations(range(3)):
        for place, player in enumerate(order):
            before = frozenset(order[:place]) & EVERYONE
            after = frozenset(order[: place + 1]) & EVERYONE
            values[player] += (by_hand[after] - by_hand[before]) / 6
    assert shapley(worth, 3).values == pytest.approx(values, abs=EXACT)


@pytest.mark.slow
@every_scheduler
def test_a_late_start_goes_on_as_a_loop_that_changes_weights(
    kind: Kind, pipeline: Any, stack: AdapterStack, unets: Merged
) -> None:
    start = 2

    def after(on: frozenset[int]) -> Tensor:
        run = plain(pipeline, kind, lambda n, count: [unets[EVERYONE if n < start else on]])
        return picture(pipeline, run)

    late = ablate(pipeline, stack, SPEC, start=start, batch=2)
    close(late.full, after(EVERYONE))
    close(late.base, after(frozenset()))
    close(late.leave_one_out[0], after(frozenset({1})))
    assert float(late.effects[0]) > 1e-4
    assert float(late.effects[2]) == 0


@pytest.mark.slow
@every_scheduler
def test_what_erasing_measures_is_what_the_loop_gave_the_model(
    kind: Kind, pipeline: Any, unets: Merged
) -> None:
    base = unets[frozenset()]
    runs = [plain(pipeline, kind, lambda n, count: [base], seed) for seed in (3, 4)]
    inputs = torch.stack([torch.cat(run.inputs) for run in runs], dim=1).flatten(0, 1)
    found = erase_objective(
        pipeline, "a photo of cat", seeds=[3, 4], steps=STEPS, guidance_scale=GUIDANCE
    )
    close(found.latents, inputs)
    text = encode_prompts(pipeline, ["a photo of cat", ""])
    value = 0.0
    with torch.no_grad():
        for time, pair in zip(runs[0].times, inputs.split(2), strict=True):
            said = [base(pair, time, t.expand(2, -1, -1)).sample for t in text]
            value += float((said[0] - said[1]).square().sum())
    # Sums of J are float32.
    assert found.value(pipeline.unet) == pytest.approx(value, rel=rounding(int(inputs.numel())))


@pytest.mark.slow
@every_scheduler
def test_training_at_the_timesteps_of_sampling_is_what_the_scheduler_says(
    kind: Kind, pipeline: Any, stack: AdapterStack
) -> None:
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    if kind.name in OTHERS:
        for measure in (
            lambda: amplify_objective(pipeline, "a photo of cat", pictures, steps=STEPS),
            lambda: renoise(pipeline, stack, SPEC, levels=3),
        ):
            with pytest.raises(ConfigError, match=f"{kind.name} does not say the noise levels"):
                measure()
        return
    objective = amplify_objective(pipeline, "a photo of cat", pictures, steps=STEPS)
    clean = pipeline.vae.encode(pictures).latent_dist.mode() * pipeline.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(objective.latents.shape, generator=generator).double()
    inputs, targets = by_scheduler(kind, clean.repeat(len(noise) // 2, 1, 1, 1), noise, 2, STEPS)
    known = known_levels(kind, objective.times)
    alike(objective.latents[known], inputs[known])
    against: Any = objective.against
    alike(against[known], targets[known])
    assert objective.value(pipeline.unet) > 0

    probe = renoise(pipeline, stack, SPEC, levels=len(pipeline.scheduler.timesteps))
    clean = trajectory(pipeline, stack, SPEC)[-1].expand(len(probe.latents), -1, -1, -1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).double()
    inputs, _ = by_scheduler(kind, clean, noise, 1, STEPS)
    known = known_levels(kind, probe.times)
    alike(probe.latents[known], inputs[known])
    with torch.no_grad():
        text = encode_prompts(pipeline, ["a photo of cat"]).expand(len(probe.latents), -1, -1)
        said = pipeline.unet(probe.latents, probe.times, encoder_hidden_states=text).sample
    close(probe.target, said)


# One step and two a timestep, with and without noise and memory.
USUAL = [
    Kind(f"{name}Scheduler")
    for name in ("DDIM", "DPMSolverMultistep", "EulerAncestralDiscrete", "HeunDiscrete", "PNDM")
]


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("kind", USUAL, ids=str)
def test_image_to_image_counts_the_steps_that_are_done(
    kind: Kind, strength: float, pipeline: Any, stack: AdapterStack, unets: Merged
) -> None:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    changes: Any = StableDiffusionImg2ImgPipeline(
        **pipeline.components, requires_safety_checker=False
    )
    changes.set_progress_bar_config(disable=True)

    def draw(**how: Any) -> Tensor:
        return changes(
            "a photo of cat",
            image,
            strength=strength,
            num_inference_steps=2 * STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **how,
        ).images

    def by_hand(models: Models) -> Tensor:
        done: list[int] = []

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            every = models(len(done), changes.num_timesteps)
            return (torch.stack([unet(*args, **kwargs)[0] for unet in every]).mean(0),)

        def after(_: Any, step: int, __: Any, known: dict[str, Any]) -> dict[str, Any]:
            done.append(step)
            return known

        pipeline.unet.forward = forward
        try:
            return draw(callback_on_step_end=after)
        finally:
            del pipeline.unet.forward

    one, other, none = unets[{0}], unets[{1}], unets[()]
    ways: dict[Method, Models] = {
        Switch(2): lambda n, count: [(one, other, none)[n // 2 % 3]],
        Schedule(((0, 0.5), (0.5, 1), (0, 1))): lambda n, count: [(one, other)[n >= count / 2]],
    }
    for method, models in ways.items():
        with compose(changes, stack, method):
            mine = draw()
        close(mine, by_hand(models))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Kind("EulerDiscreteScheduler"), *USUAL], ids=str)
def test_records_at_the_same_latents_are_of_what_the_loop_gave_the_model(
    kind: Kind, pipeline: Any, stack: AdapterStack, unets: Merged
) -> None:
    rows = torch.tensor(SCALES).diag()[:2]
    found = record(pipeline, stack, SPEC, rows, ["conv_out"], lambda at: at.outputs, forced=True)
    run = plain(pipeline, kind, lambda n, count: [unets[EVERYONE]])
    text = encode_prompts(pipeline, ["", "a photo of cat"])
    assert len(found) == len(run.times)
    for outputs, time, x in zip(found, run.times, run.inputs, strict=True):
        for k, mine in enumerate(outputs["conv_out"]):
            with torch.no_grad():
                said = unets[{k}](x.repeat(2, 1, 1, 1), time, encoder_hidden_states=text).sample
            close(mine, said)
