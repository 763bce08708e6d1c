"""Adapters that act together on one base model: their names, their factors, how much of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Stack:
    """Adapters of one base.

    Attributes:
        names: what reports call them.
        bank: their factors.
        scales: how much of each, beside what its file asks for; 1 is all of it.
    """

    names: tuple[str, ...]
    bank: AdapterBank
    scales: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(
        cls,
        adapters: Sequence[Adapter | str | Path],
        scales: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        *,
        ignore_other: bool = False,
    ) -> "Stack":
        """Stack adapters.

        Args:
            adapters: read already, or names of files as `read_adapter` takes them.
            scales: one an adapter; None takes all of each.
            names: one an adapter; None takes those of the files.
            ignore_other: see `AdapterBank.from_adapters`.

        Raises:
            ConfigError: no adapters, or as many scales or names as there are none for.
            AdapterError: a file cannot be read, or holds more than the bank can apply.
            LayoutError: they are not of one base.
        """
        read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
        bank = AdapterBank.from_adapters(read, ignore_other)
        scales = (1.0,) * len(read) if scales is None else tuple(map(float, scales))
        names = _names(read) if names is None else tuple(names)
        for what, given in (("scales", scales), ("names", names)):
            if len(given) != len(read):
                raise ConfigError(f"{what}: expected {len(read)}, one an adapter, got {len(given)}")
        if not bool(torch.tensor(scales).isfinite().all()):
            raise ConfigError(f"scales: expected finite numbers, got {scales}")
        return cls(names, bank, scales)


def _names(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Names of files without what is the same for all; numbered where two are alike."""
    stems = [Path(adapter.source).stem or f"adapter {k}" for k, adapter in enumerate(adapters)]
    return tuple(
        stem if stems.count(stem) == 1 else f"{stem} {stems[:k].count(stem) + 1}"
        for k, stem in enumerate(stems)
    )
