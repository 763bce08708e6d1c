"""Rows from adapter files in a model repository, of which only some modules are fetched."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.adapters.locate import AdapterRef
from lora_ws.adapters.projection import project_adapter
from lora_ws.adapters.reader import read_adapter
from lora_ws.adapters.remote import HubFile, list_adapters
from lora_ws.collection.card import DatasetCard
from lora_ws.collection.facts import RowFacts
from lora_ws.collection.files_source import with_alpha
from lora_ws.collection.source import Batch, read_batches
from lora_ws.errors import AdapterError, DataError


@dataclass(frozen=True)
class RemoteSource:
    """Modules of adapter files on the Hub, read by byte ranges at one commit.

    Attributes:
        card: of the collection, whose ``modules`` are read.
        files: at one commit.
        facts: what paths and tables say of them.
    """

    card: DatasetCard
    files: Sequence[HubFile]
    facts: RowFacts

    def identity(self) -> Mapping[str, Any]:
        """Paths, sizes, and the modules."""
        files = [[file.filename, file.size] for file in self.files]
        return {"kind": "remote", "files": files, "modules": list(self.card.modules)}

    def count(self) -> int:
        """One row per file."""
        return len(self.files)

    def find_layout(self) -> Layout:
        """Of the modules of the first file that can be read."""
        reason = ""
        for file in self.files:
            try:
                return read_adapter(_ref(file), only=self.card.modules).layout
            except AdapterError as error:
                if error.reason == "remote":
                    raise
                reason = reason or str(error)
        raise DataError(f"none of {len(self.files)} files is a readable adapter; first: {reason}")

    def batches(self, layout: Layout, skip: int) -> Iterator[Batch]:
        """Fetch the files, some at a time; trouble with the server ends the import until called."""
        names = {file.filename: file for file in self.files}

        def read(name: str) -> tuple[np.ndarray, dict[str, Any]]:
            row = self.facts.of(name)
            adapter = read_adapter(_ref(names[name]), only=self.card.modules)
            adapter = with_alpha(adapter, self.card.alpha_from)
            found = project_adapter(adapter, layout)
            return found.weights, {**row, "source": name, "retained_energy": found.energy}

        return read_batches(list(names), read, layout, skip)


def remote_files(card: DatasetCard, revision: str) -> list[HubFile]:
    """The files of a model repository that hold rows, in the order of their paths.

    Raises:
        DataError: there is none.
        NotAvailableError: the Hub cannot be reached, or has no such repository.
    """
    listed = list_adapters(card.hub_id, revision)
    files = [one for one in listed if any(fnmatch(one.filename, p) for p in card.files)]
    if not files:
        raise DataError(f"{card.hub_id} holds no file that matches {', '.join(card.files)}")
    return sorted(files, key=lambda one: one.filename)


def _ref(file: HubFile) -> AdapterRef:
    name = f"{file.repo_id}/{file.filename}"
    return AdapterRef(name, None, file.repo_id, file.filename, file.revision)
