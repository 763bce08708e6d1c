"""Which of the two engines trains an experiment, and where."""

import logging
from typing import Literal

import torch

from lora_ws.errors import ConfigError
from lora_ws.learn.ranks import check_devices
from lora_ws.learn.spec import ExperimentSpec, TrainerSpec

logger = logging.getLogger("lora_ws")


def device_of(trainer: TrainerSpec) -> torch.device:
    """Where the batched engine trains: a CUDA device where there is one and it may be used.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    check_devices(trainer)
    found = torch.cuda.is_available()
    return torch.device("cuda" if found and trainer.accelerator != "cpu" else "cpu")


def engine_of(spec: ExperimentSpec) -> Literal["one-by-one", "batched"]:
    """The engine that a spec asks for, logged once; auto takes batched on CUDA alone.

    On a CPU one network fills a core, and a stack of them takes longer (`benchmarks/many.py`).

    Raises:
        ConfigError: the batched engine is asked for where there is no GPU, and the CPU is not.

    Example:
        >>> engine_of(ExperimentSpec(trainer=TrainerSpec(accelerator="cpu")))
        'one-by-one'
    """
    trainer = spec.trainer
    cuda = device_of(trainer).type == "cuda"
    engine = trainer.engine
    if engine == "batched" and not cuda and trainer.accelerator != "cpu":
        raise ConfigError(
            "trainer.engine: expected a CUDA device with batched, found none; leave it out, or add "
            "--trainer.accelerator cpu to train in one stack on the CPU, which takes longer"
        )
    if engine == "auto":
        alone = not cuda or bool(trainer.lightning) or trainer.world != 1
        alone = alone or bool(spec.unbatched) or spec.reads_factors
        engine = "one-by-one" if alone else "batched"
    where = "on CUDA" if cuda else "not on CUDA"
    logger.info("engine: %s, %s (trainer.engine: %s)", engine, where, trainer.engine)
    return engine
