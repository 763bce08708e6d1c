"""The spec of `lora-ws study`: its fields are the command's flags."""

from dataclasses import dataclass
from pathlib import Path

from lora_ws.errors import ConfigError, check_range


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """What is studied.

    Attributes:
        model: bundles: folders, names of shipped ones, or repositories on the Hub.
        dataset: a collection; null takes the training collection of each bundle.
        subset: subset of the collection; null takes that of training.
        draws: how often each level that draws something is drawn.
        out: folder for records, tables, curves and the page; a study that was cut off goes on.
    """

    model: list[str]
    dataset: str | None = None
    subset: str | None = None
    draws: int = 5
    out: Path = Path("study")

    def __post_init__(self) -> None:
        check_range("draws", self.draws, 1, 1000)
        if not self.model:
            raise ConfigError("model: expected at least one bundle, got none")
