"""Samplers: schedulers of diffusers by class name, and what hobby tools call the same."""

from typing import Any, NamedTuple

from lora_ws.config import nearest
from lora_ws.diffusion.schedulers import is_flow
from lora_ws.errors import ConfigError


class Sampler(NamedTuple):
    """Names of one sampler, where the class alone says which it is.

    Attributes:
        scheduler: class of diffusers.
        a1111: name in A1111.
        comfy: name in ComfyUI; empty where it has none.
    """

    scheduler: str
    a1111: str
    comfy: str


SAMPLERS = (
    Sampler("DDIMScheduler", "DDIM", "ddim"),
    Sampler("DDPMScheduler", "DDPM", "ddpm"),
    Sampler("DEISMultistepScheduler", "DEIS", "deis"),
    Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", "dpmpp_2m"),
    Sampler("EulerAncestralDiscreteScheduler", "Euler a", "euler_ancestral"),
    Sampler("EulerDiscreteScheduler", "Euler", "euler"),
    Sampler("HeunDiscreteScheduler", "Heun", "heun"),
    Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", "dpm_2_ancestral"),
    Sampler("KDPM2DiscreteScheduler", "DPM2", "dpm_2"),
    Sampler("LCMScheduler", "LCM", "lcm"),
    Sampler("LMSDiscreteScheduler", "LMS", "lms"),
    Sampler("PNDMScheduler", "PLMS", ""),
    Sampler("UniPCMultistepScheduler", "UniPC", "uni_pc"),
)


def sampler_of(scheduler: str) -> Sampler:
    """Names of a scheduler's class; its own for A1111, and none for ComfyUI, where it is not known.

    Example:
        >>> sampler_of("EulerAncestralDiscreteScheduler").a1111
        'Euler a'
    """
    known = {sampler.scheduler: sampler for sampler in SAMPLERS}
    return known.get(scheduler, Sampler(scheduler, scheduler.removesuffix("Scheduler"), ""))


def scheduler_called(name: str) -> str | None:
    """The class of diffusers that A1111, ComfyUI or diffusers call this; None where none is known.

    Example:
        >>> scheduler_called("dpmpp_2m"), scheduler_called("Euler a"), scheduler_called("Restart")
        ('DPMSolverMultistepScheduler', 'EulerAncestralDiscreteScheduler', None)
    """
    wanted = name.strip().lower()
    for sampler in SAMPLERS:
        own = (sampler.scheduler, sampler.scheduler.removesuffix("Scheduler"), *sampler[1:])
        if wanted and wanted in map(str.lower, own):
            return sampler.scheduler
    return None


def use_scheduler(pipeline: Any, name: str | None) -> None:
    """Let a pipeline sample with another scheduler, made from the configuration of its own.

    Args:
        pipeline: of diffusers.
        name: class of diffusers; None leaves the pipeline's own.

    Raises:
        ConfigError: diffusers has no such scheduler, or it is for models that predict something
            else.

    Example:
        >>> from types import SimpleNamespace
        >>> from diffusers import DDIMScheduler
        >>> pipeline = SimpleNamespace(scheduler=DDIMScheduler())
        >>> use_scheduler(pipeline, "EulerDiscreteScheduler")
        >>> type(pipeline.scheduler).__name__
        'EulerDiscreteScheduler'
    """
    if name is None:
        return
    import diffusers

    own = pipeline.scheduler
    known = [key for key in dir(diffusers) if key.endswith("Scheduler") and "Flax" not in key]
    if name not in known:
        raise ConfigError(
            f"scheduler: diffusers has no `{name}`{nearest(name, known)}; expected a class such as "
            f"{type(own).__name__}"
        )
    try:
        made = getattr(diffusers, name).from_config(own.config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"scheduler: {name} cannot be made for this base ({first})") from error
    # What a model predicts, noise or flow, is not the scheduler's to choose.
    if is_flow(made) != is_flow(own):
        raise ConfigError(
            f"scheduler: {name} is not for a model that predicts "
            f"{'flow' if is_flow(own) else 'noise'}; expected a class such as {type(own).__name__}"
        )
    pipeline.scheduler = made
