"""The spec of `lora-ws study`: its fields are the command's flags."""

from dataclasses import dataclass
from pathlib import Path

from lora_ws.errors import check_range


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """What is studied.

    Attributes:
        model: bundles: folders, names of shipped ones, or repositories on the Hub.
        spec: recipes, by file or by name in training/. Studies that train run on them; for all
            others a bundle is trained by each.
        dataset: a collection; null takes the training collection of each bundle or recipe.
        subset: subset of the collection; null takes that of training, or the card's main one.
        draws: how often each level that draws something is drawn, and trained.
        clean_validation: whether validation labels stay true where a study makes labels wrong, so
            that an epoch is chosen on true labels.
        processes: parallel processes for studies that train.
        out: folder for records, tables, curves and the page; a study that was cut off goes on.
    """

    model: list[str] | None = None
    spec: list[str] | None = None
    dataset: str | None = None
    subset: str | None = None
    draws: int = 5
    clean_validation: bool = False
    processes: int = 1
    out: Path = Path("study")

    def __post_init__(self) -> None:
        check_range("draws", self.draws, 1, 1000)
        check_range("processes", self.processes, 1, 256)
