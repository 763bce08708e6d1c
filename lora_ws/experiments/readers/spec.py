"""What the file of a comparison of readers holds."""

from dataclasses import dataclass, field
from typing import Any

from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.quoted import PublishedTable


@dataclass(frozen=True)
class ColumnSpec:
    """A question to every reader.

    Attributes:
        name: title of the column.
        subset: subset of the adapters.
        split: column of the split; null takes the collection's rule.
    """

    name: str
    subset: str
    split: str | None = None


@dataclass(frozen=True)
class ReaderSpec:
    """A row: a recipe of `training/`, and whose reader it is.

    Attributes:
        name: title of the row.
        recipe: recipe in `training/`.
        source: paper, or another source.
        shuffled: a control: labels are shuffled.
        sizes: name of a budget, such as ``1.3M``, -> arguments of the network that meet it.
    """

    name: str
    recipe: str
    source: str = ""
    shuffled: bool = False
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadersSpec(EvalSpec):
    """A comparison of readers.

    Attributes:
        dataset: default collection.
        seeds: number of seeds, for readers with random initialisation.
        columns: questions.
        groups: title of a group of rows -> its readers.
        measured_elsewhere: rows that need the photos, ``name: [percent per column]``, by the
            command that the note names.
        note: on these rows.
        published: tables of the readers' own papers, on other collections.
    """

    dataset: str
    seeds: int
    columns: tuple[ColumnSpec, ...]
    groups: dict[str, tuple[ReaderSpec, ...]]
    measured_elsewhere: dict[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""
    published: tuple[PublishedTable, ...] = ()

    @property
    def readers(self) -> list[ReaderSpec]:
        """All rows."""
        return [reader for rows in self.groups.values() for reader in rows]
