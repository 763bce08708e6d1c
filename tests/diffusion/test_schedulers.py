"""Every scheduler that diffusers can build, against loops by hand with merged weights, in float64.

The loops know nothing of banks, batches of mixtures, or of how steps are counted: one image, one
copy of the U-Net per mixture, a scheduler and a generator as diffusers' documentation has them.
"""

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging
from tolerances import EXACT, rounding
from torch import Tensor

from lora_ws.attribution.ablation import ablate, draw_subsets
from lora_ws.attribution.boxes import renoise
from lora_ws.attribution.shapley import shapley, subsets_of
from lora_ws.attribution.trajectory import trajectory
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
from lora_ws.diffusion.schedulers import timesteps_of
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


class Kind(NamedTuple):
    """A class of scheduler, and what is set otherwise."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{value}" for _, value in self.options)])

    def build(self) -> Any:
        """From the configuration of the tiny pipeline, as users change schedulers."""
        kind, level = getattr(diffusers, self.name), logging.get_verbosity()
        logging.set_verbosity_error()  # What of the configuration a class does not know.
        try:
            return kind.from_config(_config(), **dict(self.options))
        finally:
            logging.set_verbosity(level)


def _config() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).config


def _built() -> list[str]:
    """Names of all classes that a scheduler of Stable Diffusion can be exchanged for."""
    found = []
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler")):
        try:
            Kind(name).build()
        except (TypeError, ValueError, ImportError, AttributeError):
            continue  # Needs what the configuration lacks, or a package.
        found.append(name)
    return found


# Names that are refused, and by what word.
REFUSED = {
    "BlockRefinementScheduler": "no init_noise_sigma",
    "CogVideoXDPMScheduler": "old_pred_original_sample",
    "DDIMInverseScheduler": "from images to noise",
    "DDPMWuerstchenScheduler": "a pipeline of its own",
    "DPMSolverMultistepInverseScheduler": "from images to noise",
    "DiscreteDDIMScheduler": "no init_noise_sigma",
    "EntropyBoundScheduler": "no init_noise_sigma",
    "FlowMapEulerDiscreteScheduler": "no init_noise_sigma",
    "FlowMatchEulerDiscreteScheduler": "no init_noise_sigma",
    "FlowMatchHeunDiscreteScheduler": "no init_noise_sigma",
    "FlowMatchLCMScheduler": "no init_noise_sigma",
    "HeliosDMDScheduler": "no init_noise_sigma",
    "HeliosScheduler": "no init_noise_sigma",
    "KarrasVeScheduler": "sample_hat",
    "LTXEulerAncestralRFScheduler": "no init_noise_sigma",
    "MiniMaxH3Scheduler": "no init_noise_sigma",
    "PiflowScheduler": "no init_noise_sigma",
    "RePaintScheduler": "original_image",
    "SCMScheduler": "no scale_model_input",
    "ScoreSdeVeScheduler": "no ",
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    BUILT = _built()
# Of models that are trained otherwise; they have no noise levels to train at.
OTHERS = (
    "CMStochasticIterativeScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "IPNDMScheduler",
)
KINDS = [
    *(Kind(name) for name in BUILT if name not in REFUSED),
    Kind("DDIMScheduler", (("prediction_type", "v_prediction"),)),
    Kind("DPMSolverMultistepScheduler", (("algorithm_type", "sde-dpmsolver++"),)),
    Kind("EulerDiscreteScheduler", (("prediction_type", "v_prediction"),)),
    Kind("HeunDiscreteScheduler", (("use_karras_sigmas", True),)),
    Kind("LMSDiscreteScheduler", (("timestep_spacing", "linspace"),)),
    Kind("PNDMScheduler", (("skip_prk_steps", True),)),
]
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


class Unets:
    """Copies of the U-Net with the updates of some adapters in its weights."""

    def __init__(self, unet: Any, stack: AdapterStack) -> None:
        self._unet, self._stack = unet, stack
        self._made: dict[frozenset[int], Any] = {}

    def __getitem__(self, on: frozenset[int]) -> Any:
        on = on & EVERYONE
        if on not in self._made:
            made, rows = copy.deepcopy(self._unet), self._stack.bank.rows()
            for layer, down, up in self._stack.bank.layout.pairs():
                weight = made.get_submodule(layer.name).weight
                for k in on:
                    # Scales are float32.
                    scale = float(torch.tensor(SCALES[k]))
                    b, a = rows[k, up].view(layer.up_shape), rows[k, down].view(layer.down_shape)
                    weight.data += scale * b @ a
            self._made[on] = made
        return self._made[on]


@pytest.fixture(scope="module")
def unets(_pipeline: Any, stack: AdapterStack) -> Unets:
    return Unets(_pipeline.unet, stack)


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


@pytest.mark.slow
@every_scheduler
def test_composing_is_a_loop_with_merged_weights(
    kind: Kind, pipeline: Any, stack: AdapterStack, unets: Unets
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
    kind: Kind, pipeline: Any, stack: AdapterStack, unets: Unets
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
    kind: Kind, pipeline: Any, stack: AdapterStack, unets: Unets
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
    kind: Kind, pipeline: Any, unets: Unets
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
    inputs, targets = by_scheduler(kind, clean.repeat(len(noise) // 2, 1, 1, 1), noise, 2)
    known = known_levels(kind, objective.times)
    alike(objective.latents[known], inputs[known])
    alike(objective.against[known], targets[known])
    assert objective.value(pipeline.unet) > 0

    probe = renoise(pipeline, stack, SPEC, levels=len(pipeline.scheduler.timesteps))
    clean = trajectory(pipeline, stack, SPEC)[-1].expand(len(probe.latents), -1, -1, -1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).double()
    inputs, _ = by_scheduler(kind, clean, noise, 1)
    known = known_levels(kind, probe.times)
    alike(probe.latents[known], inputs[known])
    with torch.no_grad():
        text = encode_prompts(pipeline, ["a photo of cat"]).expand(len(probe.latents), -1, -1)
        said = pipeline.unet(probe.latents, probe.times, encoder_hidden_states=text).sample
    close(probe.target, said)


def alike(one: Tensor, other: Tensor) -> None:
    """Equal but for schedulers' noise levels, which are float32, of some as sigmas."""
    atol = rounding(16, size=float(other.abs().max()))
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def known_levels(kind: Kind, times: Tensor) -> Tensor:
    """Where a scheduler's own methods know the noise level: KDPM2's not halfway in a step."""
    return (times == times.round()) | (kind.name != "KDPM2DiscreteScheduler")


def by_scheduler(kind: Kind, clean: Tensor, noise: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """What the scheduler's own methods make of latents at each of its timesteps, and the target."""
    inputs, targets = [], []
    parts = zip(clean.split(images), noise.split(images), strict=True)
    for number, (x, eps) in enumerate(parts):
        scheduler = kind.build()
        scheduler.set_timesteps(STEPS)
        time = scheduler.timesteps[number]
        noised = scheduler.add_noise(x, eps, time.repeat(images))
        inputs.append(scheduler.scale_model_input(noised, time))
        if dict(kind.options).get("prediction_type") == "v_prediction":
            signal, spread = _shares(inputs[-1], x, eps)
            eps = signal * eps - spread * x
        targets.append(eps)
    return torch.cat(inputs), torch.cat(targets)


def _shares(noised: Tensor, x: Tensor, eps: Tensor) -> list[float]:
    """How much of latents and of noise is in their sum, by least squares."""
    columns = torch.stack([x.flatten(), eps.flatten()], dim=1)
    return torch.linalg.lstsq(columns, noised.flatten()).solution.tolist()
