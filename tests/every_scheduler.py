"""Every scheduler that diffusers can build, and what each says of training, by its own methods."""

import warnings
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.utils import logging
from tolerances import rounding
from torch import Tensor

from lora_ws.diffusion.pipeline import ddim_scheduler
from lora_ws.diffusion.schedulers import is_flow


class Kind(NamedTuple):
    """A class of scheduler, and what is set otherwise."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{value}" for _, value in self.options)])

    def build(self, own: Any = None) -> Any:
        """From the configuration of a base's scheduler, Stable Diffusion's for None."""
        kind, level = getattr(diffusers, self.name), logging.get_verbosity()
        logging.set_verbosity_error()  # What of the configuration a class does not know.
        try:
            config = ddim_scheduler().config if own is None else own
            return kind.from_config(config, **dict(self.options))
        finally:
            logging.set_verbosity(level)


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
_FLOW = (("prediction_type", "flow_prediction"), ("use_flow_sigmas", True))
# Of models that predict flow.
FLOW_KINDS = [
    Kind("FlowMatchEulerDiscreteScheduler"),
    Kind("FlowMatchEulerDiscreteScheduler", (("stochastic_sampling", True),)),
    Kind("FlowMatchHeunDiscreteScheduler"),
    Kind("FlowMatchLCMScheduler"),
    Kind("FlowMapEulerDiscreteScheduler"),
    Kind("DEISMultistepScheduler", _FLOW),
    Kind("DPMSolverMultistepScheduler", _FLOW),
    Kind("DPMSolverMultistepScheduler", (*_FLOW, ("algorithm_type", "sde-dpmsolver++"))),
    # Of flow it denoises, whatever its name says.
    Kind("DPMSolverMultistepInverseScheduler", _FLOW),
    Kind("DPMSolverSinglestepScheduler", _FLOW),
    Kind("SASolverScheduler", _FLOW),
    Kind("UniPCMultistepScheduler", _FLOW),
]


def flow_built(own: Any) -> set[str]:
    """Names of all classes that a scheduler of a model that predicts flow can be exchanged for."""
    found = set()
    for name in (n for n in dir(diffusers) if n.endswith("Scheduler")):
        for options in ((), _FLOW):
            try:
                made = Kind(name, options).build(own)
            except (TypeError, ValueError, ImportError, AttributeError):
                continue  # Needs what the configuration lacks, or a package.
            if hasattr(made, "step") and is_flow(made):
                found.add(name)
    return found


def alike(one: Tensor, other: Tensor) -> None:
    """Equal but for schedulers' noise levels, which are float32, of some as sigmas."""
    atol = rounding(16, size=float(other.abs().max()))
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def known_levels(kind: Kind, times: Tensor) -> Tensor:
    """Where a scheduler's own methods know the noise level: KDPM2's not halfway in a step."""
    return (times == times.round()) | (kind.name != "KDPM2DiscreteScheduler")


def by_scheduler(
    kind: Kind, clean: Tensor, noise: Tensor, images: int, steps: int, own: Any = None
) -> tuple[Tensor, Tensor]:
    """What the scheduler's own methods make of latents at each of its timesteps, and the target."""
    inputs, targets = [], []
    parts = zip(clean.split(images), noise.split(images), strict=True)
    for number, (x, eps) in enumerate(parts):
        scheduler = kind.build(own)
        scheduler.set_timesteps(steps)
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
