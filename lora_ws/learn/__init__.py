"""Train, evaluate and keep classifiers of adapters: one training loop for every command."""

from lora_ws.learn.bundle import Bundle
from lora_ws.learn.run import run, run_many, run_one
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec

__all__ = ["Bundle", "ExperimentSpec", "FitSpec", "TrainerSpec", "run", "run_many", "run_one"]
