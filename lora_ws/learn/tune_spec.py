"""`TuneSpec`: an experiment, and where to look for better parameters of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_ws.errors import ConfigError
from lora_ws.learn.spec import ExperimentSpec

RANGE = {"low", "high", "log", "step"}


@dataclass(frozen=True)
class TuneSpec(ExperimentSpec):
    """Search the parameters of an experiment by its score on the validation rows.

    Attributes:
        search: search space, by dotted key of model, featurizer, fit or matrices: a list of values,
            or a range ``{low: 1e-4, high: 1e-2, log: true}``; a range is of integers if both ends
            are.
        trials: total number of trials, including those of earlier calls.
    """

    search: dict[str, Any] = field(default_factory=dict)
    trials: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.search:
            raise ConfigError("search: expected at least one key, such as fit.lr, got none")
        if self.trials < 1:
            raise ConfigError(f"trials: expected at least 1, got {self.trials}")
        for key, domain in self.search.items():
            _check(key, domain)
        self.check_single()

    def experiment(self) -> ExperimentSpec:
        """The experiment alone, before anything is chosen."""
        own = {name: getattr(self, name) for name in ExperimentSpec.__dataclass_fields__}
        return ExperimentSpec(**own)


def _check(key: str, domain: Any) -> None:
    if isinstance(domain, Mapping):
        ends = [end for k in ("low", "high") if isinstance(end := domain.get(k), int | float)]
        if {*domain} <= RANGE and len(ends) == 2 and ends[0] < ends[1]:
            return
    elif isinstance(domain, list | tuple) and domain:
        return
    raise ConfigError(
        f"search.{key}: expected a list of values, or low and high of a range (with log or step), "
        f"got {domain}"
    )
