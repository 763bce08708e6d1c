"""Schedulers of diffusers, whichever: what the model is given, each step, what it should predict.

All counts are of a scheduler's own timesteps, each of which is one call of the model: 20 steps are
39 timesteps of Heun and 21 of PNDM. What a multistep scheduler remembers, and the generator of an
image from which an ancestral one draws, are part of where a generation is: see `Run`.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor

from lora_ws.diffusion.families import family_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import Step
from lora_ws.errors import ConfigError

# What a pipeline with a U-Net asks of a scheduler.
_NEEDED = ("set_timesteps", "init_noise_sigma", "scale_model_input", "step")
_STEP = ("model_output", "timestep", "sample")


class Call(NamedTuple):
    """A call of the model, and the step of the scheduler that follows.

    Attributes:
        time: the timestep.
        inputs: what the model is given, without the repetition for guidance.
        before: latents before the step; `inputs` are these, scaled.
        after: latents after it.
    """

    time: Tensor
    inputs: Float[Tensor, "n channels h w"]
    before: Float[Tensor, "n channels h w"]
    after: Float[Tensor, "n channels h w"]


@dataclass
class Run:
    """A generation under way, and all that its next step depends on.

    Attributes:
        scheduler: with what it remembers of the steps so far.
        latents: before the next step.
        generators: of the noise that steps add, one per image.
        number: of the next timestep, from 0.
    """

    scheduler: Any
    latents: Float[Tensor, "n channels h w"]
    generators: list[torch.Generator]
    number: int = 0

    @property
    def left(self) -> Tensor:
        """The timesteps that are not done yet."""
        return self.scheduler.timesteps[self.number :]

    def inputs(self) -> Float[Tensor, "n channels h w"]:
        """What the model is given at the next timestep."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return self.latents
        return self.scheduler.scale_model_input(self.latents, self.left[0])

    def step(self, prediction: Float[Tensor, "n channels h w"]) -> None:
        """Go one timestep on, by what the model predicts."""
        # As pipelines do: without noise where its size, eta, can be chosen.
        options = {"generator": self.generators, "eta": 0.0}
        taken = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in taken}
        said = self.scheduler.step(prediction, self.left[0], self.latents, **options)
        self.latents, self.number = said.prev_sample, self.number + 1

    def repeated(self, rows: int) -> "Run":
        """The run of one image as so many equal ones, which go on by themselves."""
        scheduler = copy.deepcopy(self.scheduler)
        for name, value in vars(scheduler).items():
            setattr(scheduler, name, _repeated(value, self.latents.shape, rows))
        generators = [self.generators[0].clone_state() for _ in range(rows)]
        latents = self.latents.expand(rows, -1, -1, -1)
        return replace(self, scheduler=scheduler, latents=latents, generators=generators)


def begin_run(
    pipeline: Any,
    noise: Float[Tensor, "n channels h w"],
    generation: GenerationSpec,
    *,
    seeds: Sequence[int] | None = None,
) -> Run:
    """Begin a generation with the scheduler of a pipeline; see `denoise` there."""
    denoiser, first = family_of(pipeline).denoiser, generation.seed
    seeds = range(first, first + len(noise)) if seeds is None else seeds
    timesteps_for(pipeline, generation)
    scheduler = pipeline.scheduler
    latents = noise.to(denoiser.device, denoiser.dtype)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1)
    return Run(scheduler, latents, step_generators(noise, seeds))


@torch.no_grad()
def continue_run(pipeline: Any, run: Run, generation: GenerationSpec) -> Iterator[Call]:
    """Do the steps of a generation that are left, and show each.

    Args:
        pipeline: the base; adapters may be attached to it.
        run: where the generation is; goes along.
        generation: what is drawn.

    Raises:
        ConfigError: there are several prompts, and not one per image.
    """
    family = family_of(pipeline)
    guided, text = family.guided(generation), family.condition(generation, len(run.latents))
    for time in run.left:
        before, x = run.latents, run.inputs()
        said = family.predict(torch.cat([x] * (1 + guided)), time, text)
        if guided:
            plain, asked = said.chunk(2)
            said = plain + generation.guidance_scale * (asked - plain)
        run.step(said)
        yield Call(time, x, before, run.latents)


def step_generators(
    noise: Float[Tensor, "n channels h w"], seeds: Sequence[int]
) -> list[torch.Generator]:
    """Generators as they stand once each has drawn the noise that its image starts from."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:
        torch.randn(noise.shape[1:], generator=generator)
    return generators


def timesteps_for(pipeline: Any, generation: GenerationSpec) -> Tensor:
    """Set the scheduler of a pipeline to the first step of a generation; see `timesteps_of`."""
    family = family_of(pipeline)
    options = {"device": family.denoiser.device, **family.timesteps(generation)}
    steps, unet = generation.num_inference_steps, family.component == "unet"
    return timesteps_of(pipeline.scheduler, steps, unet=unet, **options)


def timesteps_of(scheduler: Any, steps: int, *, unet: bool = True, **options: Any) -> Tensor:
    """Set a scheduler to the first of so many steps, and list its timesteps.

    Args:
        scheduler: of diffusers.
        steps: of denoising.
        unet: whether it is for a pipeline with a U-Net.
        options: of ``set_timesteps``.

    Raises:
        ConfigError: the scheduler is not for pipelines with a U-Net.

    Example:
        >>> from diffusers import DDIMScheduler, HeunDiscreteScheduler
        >>> timesteps_of(DDIMScheduler(), 3).tolist()
        [666, 333, 0]
        >>> len(timesteps_of(HeunDiscreteScheduler(), 3))
        5
    """
    if unet:
        _check(scheduler)
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"scheduler: {_name(scheduler)} cannot make {steps} steps ({error})"
        ) from error
    times = scheduler.timesteps
    if len(times) > 1 and times[0] < times[-1]:
        raise ConfigError(
            f"scheduler: {_name(scheduler)} goes from images to noise; expected one that denoises"
        )
    return times


def forgets(pipeline: Any, generation: GenerationSpec) -> bool:
    """Whether latents alone say how a generation goes on: no memory of steps, no noise drawn.

    Example:
        >>> from diffusers import PNDMScheduler
        >>> from lora_ws.diffusion.pipeline import load_pipeline
        >>> pipeline, generation = load_pipeline("digit-sd"), GenerationSpec("three")
        >>> forgets(pipeline, generation)
        True
        >>> pipeline.scheduler = PNDMScheduler()
        >>> forgets(pipeline, generation)
        False
    """
    return _tried(pipeline, generation) == (False, False)


def draws_noise(pipeline: Any, generation: GenerationSpec) -> bool:
    """Whether steps of the scheduler add noise.

    Example:
        >>> from diffusers import LCMScheduler
        >>> from lora_ws.diffusion.pipeline import load_pipeline
        >>> pipeline, generation = load_pipeline("digit-sd"), GenerationSpec("three")
        >>> draws_noise(pipeline, generation)
        False
        >>> pipeline.scheduler = LCMScheduler()
        >>> draws_noise(pipeline, generation)
        True
    """
    return _tried(pipeline, generation).draws


class _Tried(NamedTuple):
    """What two steps of a scheduler do: keep something of the latents' shape, draw noise."""

    keeps: bool
    draws: bool


def _tried(pipeline: Any, generation: GenerationSpec) -> _Tried:
    timesteps_for(pipeline, generation)
    noise, keeps = torch.zeros(1, 1, 2, 3), False
    run = Run(copy.deepcopy(pipeline.scheduler), noise, step_generators(noise, [0]))
    drawn = run.generators[0].get_state()
    for _ in run.left[:2]:
        run.step(run.inputs())
        # After each: Heun's second step forgets what the first one kept.
        keeps |= any(_holds(value, noise.shape) for value in vars(run.scheduler).values())
    return _Tried(keeps, not torch.equal(drawn, run.generators[0].get_state()))


def training_pair(
    scheduler: Any,
    clean: Float[Tensor, "n channels h w"],
    noise: Float[Tensor, "n channels h w"],
    times: Real[Tensor, " n"],
) -> tuple[Float[Tensor, "n channels h w"], Float[Tensor, "n channels h w"]]:
    """What a model is given and should predict when it is trained, at any times of a scheduler.

    Both depend on noise levels and ``prediction_type`` alone, and not on how the scheduler samples.

    Args:
        scheduler: of the model.
        clean: latents of images.
        noise: of unit variance.
        times: one per latent; between two whole ones the noise level is interpolated.

    Returns:
        Inputs, and the target: the noise, the velocity, the latents, or noise less latents (flow).

    Raises:
        ConfigError: the scheduler does not say the noise levels that the model was trained on, or
            the model predicts something else.
    """
    config, shape = scheduler.config, (-1, 1, 1, 1)
    times = times.to(clean.device)
    if is_flow(scheduler):
        sigma = (times / config.num_train_timesteps).to(clean.dtype).view(shape)
        return (1 - sigma) * clean + sigma * noise, noise - clean
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(
            f"scheduler: {_name(scheduler)} does not say the noise levels of training; set one "
            "with alphas_cumprod, such as DDIMScheduler"
        )
    kept = _signal(scheduler.alphas_cumprod.to(clean.device, clean.dtype), times).view(shape)
    signal, spread = kept**0.5, (1 - kept) ** 0.5
    targets = {
        "epsilon": noise,
        "v_prediction": signal * noise - spread * clean,
        "sample": clean,
    }
    if config.prediction_type not in targets:
        raise ConfigError(
            f"scheduler: expected prediction_type {', '.join(targets)}, got "
            f"`{config.prediction_type}`"
        )
    return signal * clean + spread * noise, targets[config.prediction_type]


def is_flow(scheduler: Any) -> bool:
    """Whether the model of a scheduler predicts flow: noise less latents.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
        >>> is_flow(DDIMScheduler()), is_flow(FlowMatchEulerDiscreteScheduler())
        (False, True)
    """
    # Its own arguments: a configuration also keeps what another class was told.
    taken = inspect.signature(type(scheduler).__init__).parameters
    if "prediction_type" not in taken:
        return "Flow" in _name(scheduler)
    return "use_flow_sigmas" in taken and scheduler.config.prediction_type == "flow_prediction"


# Of the first timestep: what times of one pair may differ by; steps are further apart.
_NEARLY = 1e-5


class Clock:
    """Tells at which step of a pipeline its denoiser is called.

    A step begins where timestep or position of the scheduler change: second-order schedulers call
    the model twice at one timestep, and some kinds of guidance twice in one step. Steps are counted
    from the first that is done, which in image to image is not the scheduler's first.

    Args:
        pipeline: with a scheduler.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._timesteps: Tensor | None = None
        self._place: tuple[Any, ...] = ()
        self._step = Step(-1, 0, -1)

    def at(self, time: float) -> Step:
        """The step of a call with this timestep."""
        scheduler = self._pipeline.scheduler
        # PNDM counts, the other multistep and second-order schedulers keep an index.
        places = (getattr(scheduler, name, None) for name in ("step_index", "counter"))
        place = (time, *places)
        # Pairs of nearly the same time may be in either order, as a processor rounds.
        again = not self._place or time > self._place[0] + _NEARLY * float(scheduler.timesteps[0])
        if again or scheduler.timesteps is not self._timesteps:
            self._step = Step(0, self._left(time), self._step.call + 1)
        elif place != self._place:
            self._step = self._step._replace(number=self._step.number + 1)
        self._timesteps, self._place = scheduler.timesteps, place
        return self._step

    def _left(self, time: float) -> int:
        """How many timesteps are done from this one on."""
        scheduler, count = self._pipeline.scheduler, len(self._pipeline.scheduler.timesteps)
        if getattr(scheduler, "begin_index", None) is not None:
            return count - scheduler.begin_index
        left = [count - k for k, t in enumerate(scheduler.timesteps.tolist()) if t == time]
        # Where two are equal, as in PNDM, the pipeline knows.
        said = getattr(self._pipeline, "num_timesteps", None)
        return said if said in left else max(left, default=count)


def _check(scheduler: Any) -> None:
    if lacking := [name for name in _NEEDED if not hasattr(scheduler, name)]:
        raise ConfigError(
            f"scheduler: {_name(scheduler)} has no {lacking[0]}; it is not for pipelines with a "
            "U-Net"
        )
    own = inspect.signature(scheduler.step).parameters.values()
    needed = [p.name for p in own if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    # Of Würstchen: its timesteps are shares of the way, and one more than it has steps.
    if needed != list(_STEP) or _name(scheduler) == "DDPMWuerstchenScheduler":
        raise ConfigError(
            f"scheduler: {_name(scheduler)} steps by {', '.join(needed)} in a pipeline of its own; "
            f"expected one of {', '.join(_STEP)} alone"
        )


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


def _signal(alphas: Float[Tensor, " levels"], times: Tensor) -> Float[Tensor, " n"]:
    """Share of the signal's variance at each time."""
    if bool((times < 0).any() or (times > len(alphas) - 1).any()):
        raise ConfigError(f"times: expected 0 to {len(alphas) - 1}, got {times.tolist()}")
    below = times.floor().long()
    part = (times - below).to(alphas.dtype)
    low, high = alphas[below], alphas[(below + 1).clamp(max=len(alphas) - 1)]
    sigma = torch.lerp(((1 - low) / low) ** 0.5, ((1 - high) / high) ** 0.5, part)
    return torch.where(part == 0, low, 1 / (1 + sigma**2))


def _holds(value: Any, shape: torch.Size) -> bool:
    """Whether a scheduler's attribute is, or lists, something of the latents' shape."""
    if isinstance(value, list | tuple):
        return any(_holds(item, shape) for item in value)
    return isinstance(value, Tensor) and value.shape == shape


def _repeated(value: Any, shape: torch.Size, rows: int) -> Any:
    """An attribute where whatever is of the shape of one latent is of so many."""
    if isinstance(value, list):
        return [_repeated(item, shape, rows) for item in value]
    if isinstance(value, Tensor) and value.shape == shape:
        return value.repeat(rows, *[1] * (value.ndim - 1))
    return value
