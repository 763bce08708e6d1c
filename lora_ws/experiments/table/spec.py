"""What the file of a table holds."""

from dataclasses import dataclass, field
from typing import Literal

from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.recipes import Protocol


@dataclass(frozen=True)
class RowSpec:
    """A row of a table.

    Attributes:
        name: title of the row.
        recipes: protocol, or ``protocol@dataset``, -> recipe in `training/`.
        published: dataset -> metric -> mean and standard deviation in percent.
        ours: not in the paper.
        note: note for the report.
    """

    name: str
    recipes: dict[str, str]
    published: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    ours: bool = False
    note: str = ""

    def recipe(self, protocol: Protocol, dataset: str) -> str | None:
        """The recipe of a protocol; None where it cannot be repeated.

        What the paper's text leaves open is done as in the clean protocol.
        """
        chain: dict[Protocol, tuple[Protocol, ...]] = {
            "clean": ("clean",),
            "paper": ("paper", "clean"),
            "as-run": ("as-run",),
        }
        for name in chain[protocol]:
            for key in (f"{name}@{dataset}", name):
                if key in self.recipes:
                    return self.recipes[key]
        return None


@dataclass(frozen=True)
class PlainInput:
    """A control: a plain input that says what the rows of a table must beat."""

    name: str
    recipe: str


@dataclass(frozen=True)
class TableSpec(EvalSpec):
    """A table: rows, what is published of them, and the controls beside them.

    Attributes:
        dataset: default collection.
        rows: of the table.
        inputs: plain inputs as controls.
        tolerance: measured and published means differ if they are further apart than this many
            standard deviations of their difference over seeds.
        layer_by: part whose loss selects a single layer for every row; empty takes all layers.
        nested: rows whose layer selection is also evaluated in nested cross-validation.
    """

    dataset: str
    rows: tuple[RowSpec, ...]
    inputs: tuple[PlainInput, ...] = ()
    tolerance: float = 2.0
    layer_by: Literal["", "val"] = ""
    nested: tuple[str, ...] = ()
