"""Schedulers by name: one that fits what the model predicts, or a refusal."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest

from lora_ws.diffusion.samplers import use_scheduler
from lora_ws.diffusion.schedulers import is_flow
from lora_ws.errors import ConfigError

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# A scheduler of the base, and what it may be exchanged for.
OWN: dict[str, tuple[Any, dict[str, bool]]] = {
    "noise": (
        diffusers.DDIMScheduler(),
        {"EulerDiscreteScheduler": True, "FlowMatchEulerDiscreteScheduler": False},
    ),
    "velocity": (
        diffusers.DDIMScheduler(prediction_type="v_prediction"),
        {"PNDMScheduler": True, "FlowMatchHeunDiscreteScheduler": False},
    ),
    "flow": (
        diffusers.FlowMatchEulerDiscreteScheduler(),
        {"FlowMatchHeunDiscreteScheduler": True, "DPMSolverMultistepScheduler": False},
    ),
    # Of a class that predicts either; its configuration says which.
    "flow by configuration": (
        diffusers.DPMSolverMultistepScheduler(**FLOW),
        {
            "UniPCMultistepScheduler": True,
            "FlowMatchEulerDiscreteScheduler": True,
            "EulerDiscreteScheduler": False,
        },
    ),
}


@pytest.mark.parametrize("own", OWN)
def test_a_scheduler_fits_what_the_model_predicts(own: str) -> None:
    scheduler, others = OWN[own]
    assert is_flow(scheduler) == own.startswith("flow")
    for name, fits in others.items():
        pipeline = SimpleNamespace(scheduler=scheduler)
        if fits:
            use_scheduler(pipeline, name)
            assert type(pipeline.scheduler).__name__ == name
            assert is_flow(pipeline.scheduler) == is_flow(scheduler)
            # And back: the configuration of one class is kept in that of the next.
            use_scheduler(pipeline, type(scheduler).__name__)
        else:
            with pytest.raises(ConfigError, match=f"{name} is not for a model that predicts"):
                use_scheduler(pipeline, name)
            assert pipeline.scheduler is scheduler


def test_a_name_that_diffusers_does_not_know_is_refused() -> None:
    pipeline = SimpleNamespace(scheduler=diffusers.DDIMScheduler())
    with pytest.raises(ConfigError, match=r"has no `EulerScheduler`.*a class such as DDIM"):
        use_scheduler(pipeline, "EulerScheduler")
