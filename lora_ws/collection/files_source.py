"""Rows from adapter files below a folder, with the metadata that stands beside them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lora_ws.adapters.adapter import Adapter
from lora_ws.adapters.layout import Layout
from lora_ws.adapters.projection import common_layout, project_adapter
from lora_ws.adapters.reader import open_adapter, read_adapter
from lora_ws.adapters.scale import UNSAID
from lora_ws.collection.beside import (
    LabelTables,
    label_of,
    own_metadata,
    read_tables,
    sidecars,
)
from lora_ws.collection.card import DatasetCard
from lora_ws.collection.decode import OURS
from lora_ws.collection.facts import RowFacts
from lora_ws.collection.source import Batch, read_batches
from lora_ws.errors import AdapterError, DataError, LayoutError, notice

CATEGORY = DatasetCard.label
# Files that are looked at to choose a layout for all, spread over the collection.
SURVEYED = 256


@dataclass(frozen=True)
class FilesSource:
    """Adapter files below a folder, in natural order of their paths.

    What is said of a file comes, the later before the earlier, from its top folder, which names
    the category; its header; sidecars and ``metadata.json`` beside it (see
    `lora_ws.collection.beside`); and a table of labels.

    Attributes:
        root: the folder.
        files: below it.
        project: bring adapters of other ranks and modules into the layout, with columns
            ``retained_energy``, ``layers_missing`` and ``layer_mask``; else they are problems.
        min_energy: share of the squared norm of an update that has to fit the layout.
        categories: of files, instead of their top folders.
        facts: what the card says of paths and tables beside the files.
        named: whether the user named the root, and not folders in it; see `read_tables`.
    """

    root: Path
    files: Sequence[Path]
    project: bool = False
    min_energy: float = 0.0
    categories: Mapping[Path, str] = field(default_factory=dict)
    facts: RowFacts | None = None
    named: bool = True

    @cached_property
    def tables(self) -> LabelTables:
        """Labels that tables in the folders give."""
        return read_tables(self.root, self.files, named=self.named)

    @cached_property
    def label_column(self) -> str:
        """The column that is the label: of a table, of folders, else of sidecars; empty if none.

        Which column of sidecars it is, or which there are, is said.
        """
        if self.tables.label:
            return self.tables.label
        if self.categories or any(f.relative_to(self.root).parts[1:] for f in self.files):
            return CATEGORY
        rows = [_beside(file) for file in self.files]
        label = label_of(row for row in rows if row)
        if label == CATEGORY:
            return label
        table = self.tables.rows.values()
        columns = ", ".join(dict.fromkeys(key for row in (*table, *rows) for key in row))
        if label:
            said = f"the label is `{label}` of what stands beside the files; --label takes another"
            notice(f"{self.root}: {said}")
        elif columns:
            said = f"no column is the label by its name; --label takes one of {columns}"
            notice(f"{self.root}: {said}")
        return label

    def identity(self) -> Mapping[str, Any]:
        """Relative paths and sizes, and how other layouts are met."""
        files = [[f.relative_to(self.root).as_posix(), f.stat().st_size] for f in self.files]
        tables = [
            [f.relative_to(self.root).as_posix(), f.stat().st_size] for f in self.tables.files
        ]
        found: dict[str, Any] = {"kind": "files", "files": files}
        if tables:
            found["tables"] = tables
        if self.project:
            found["project"] = self.min_energy
        return found

    def count(self) -> int:
        """One row per file."""
        return len(self.files)

    def find_layout(self) -> Layout:
        """From the first file that can be read; to project, what most files have in common."""
        reason, found = "", []
        step = max(1, len(self.files) // SURVEYED)
        for file in self.files[::step] if self.project else self.files:
            try:
                with open_adapter(file) as opened:
                    found.append((opened.base.name, opened.read().layout))
            except AdapterError as error:
                reason = reason or str(error)
                continue
            if not self.project:
                break
        if not found:
            said = f"none of {len(self.files)} files is a readable adapter; first: {reason}"
            raise DataError(said)
        return common_layout(found)

    def batches(self, layout: Layout, skip: int) -> Iterator[Batch]:
        """Read the files, some at a time."""
        names = {file.relative_to(self.root).as_posix(): file for file in self.files}

        def read(name: str) -> tuple[np.ndarray, dict[str, Any]]:
            try:
                return self._read(names[name], layout)
            except (AdapterError, LayoutError, DataError) as error:
                # Relative paths are enough, and the same on another machine.
                raise DataError(str(error).removeprefix(f"{names[name]}: ")) from error

        return read_batches(list(names), read, layout, skip)

    def _read(self, file: Path, layout: Layout) -> tuple[np.ndarray, dict[str, Any]]:
        if self.facts:
            card = self.facts.card
            adapter = with_alpha(read_adapter(file, only=card.modules or None), card.alpha_from)
        else:
            adapter = read_adapter(file)
        vector, fit = self._vector(adapter, layout)
        if not np.isfinite(vector).all():
            raise DataError("its scale takes values beyond float32")
        relative = file.relative_to(self.root)
        row: dict[str, Any] = {}
        if relative.parts[1:]:
            row[CATEGORY] = relative.parts[0]
        row |= own_metadata(adapter.metadata) | sidecars(file)
        row |= _metadata(file.with_name("metadata.json"))
        row |= self.tables.rows.get(relative.as_posix(), {})
        if self.facts:
            row |= self.facts.of(relative.as_posix())
            row.setdefault("rank", max(module.rank for module in adapter.modules.values()))
        if file in self.categories:
            row[CATEGORY] = self.categories[file]
        row.setdefault("folder", relative.parent.as_posix())
        row["source"] = relative.as_posix()
        row["file_sha256"] = adapter.sha256
        row["ignored_tensors"] = len(adapter.beyond_layout)
        return vector, row | fit

    def _vector(self, adapter: Adapter, layout: Layout) -> tuple[np.ndarray, dict[str, Any]]:
        """The row of an adapter, and columns that say how well it fits."""
        if not self.project and not self.facts:
            if difference := layout.difference(adapter.layout):
                raise LayoutError(
                    f"another layout than the rest of the collection: {difference}; --project auto "
                    "takes adapters of several ranks and modules"
                )
            return adapter.flat(), {}
        found = project_adapter(adapter, layout)
        if found.energy < self.min_energy:
            raise LayoutError(
                f"expected at least {self.min_energy:g} of the update's energy in the layout, got "
                f"{found.energy:.3f}; lower --min_energy, or --project a layout of higher rank"
            )
        columns = {
            "retained_energy": found.energy,
            "layers_missing": len(found.missing),
            "layer_mask": [layer.name not in found.missing for layer in layout.layers],
        }
        return found.weights, columns


def _beside(file: Path) -> dict[str, Any]:
    """What sidecars and a readable ``metadata.json`` say of a file."""
    try:
        return sidecars(file) | _metadata(file.with_name("metadata.json"))
    except DataError:
        return sidecars(file)


def _metadata(file: Path) -> dict[str, Any]:
    """What a ``metadata.json`` says of the files beside it; nothing where there is none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"its metadata.json is not readable ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"its metadata.json holds {type(found).__name__}, expected an object")
    return {f"original_{key}" if key in OURS else key: value for key, value in found.items()}


def with_alpha(adapter: Adapter, said: str) -> Adapter:
    """The scale that a card knows, for modules whose file says none.

    Args:
        adapter: as it was read.
        said: ``alpha_from`` of the card; anything but a number changes nothing.

    Example:
        >>> from lora_ws.adapters.adapter import Module
        >>> down, up = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
        >>> module = Module("unet", "mid_block.to_v", "lora", down, up, 1.0, UNSAID)
        >>> with_alpha(Adapter({module.name: module}, "a", ""), "27").modules[module.name].scale
        13.5
    """
    if not said.isdecimal():
        return adapter
    modules = {
        name: replace(one, scale=int(said) / one.rank, scale_source="the card")
        if one.scale_source == UNSAID
        else one
        for name, one in adapter.modules.items()
    }
    return replace(adapter, modules=modules)
