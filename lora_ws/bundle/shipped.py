"""The reader that comes with the library, loaded when the first file that it reads is met."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_ws.bundle.bundle import Bundle
from lora_ws.bundle.formats import INFO
from lora_ws.bundle.hub import SHIPPED


@dataclass(frozen=True)
class ShippedReader:
    """A bundle of the library that costs nothing until it is asked.

    Attributes:
        base: the base model whose adapters it reads, which is its name.

    Example:
        >>> reader = ShippedReader()
        >>> reader.base, len(reader.classes)
        ('tiny-sd', 10)
        >>> reader.bundle.base
        'tiny-sd'
    """

    base: str = "tiny-sd"

    @property
    def folder(self) -> Path:
        """Of the bundle."""
        return SHIPPED / self.base

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """What it names, without loading it."""
        return tuple(json.loads((self.folder / INFO).read_text(encoding="utf-8"))["classes"])

    @cached_property
    def bundle(self) -> Bundle:
        """Load it, once."""
        return Bundle.load(self.folder)


def loaded(reader: Bundle | ShippedReader) -> Bundle:
    """Load a reader that is not loaded yet.

    Example:
        >>> loaded(ShippedReader()).base
        'tiny-sd'
    """
    return reader.bundle if isinstance(reader, ShippedReader) else reader
