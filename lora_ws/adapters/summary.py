"""What is known of an adapter file without any classifier."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_ws.adapters.adapter import Adapter
from lora_ws.adapters.header import shown
from lora_ws.adapters.reader import AdapterFile
from lora_ws.adapters.structure import Structure
from lora_ws.errors import printable
from lora_ws.functional.sketch import module_norms

# Facts of training that files claim; other entries are left out.
CLAIMS = ("ss_", "modelspec.", "lora_adapter_metadata")
LONGEST_CLAIM = 120


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter file in plain data.

    Attributes:
        base: base model.
        evidence: which layer shows it.
        modules: component -> how many modules.
        methods: ``lora``, ``loha``, … -> how many modules.
        ranks: rank -> how many modules.
        scales: scale and where it is stated -> how many of the modules that were read.
        norm: Frobenius norm of the update of all modules that were read.
        norms: the same of each module.
        warnings: what a reader should know.
        claims: text of the header about its training, shortened: the file's word, unchecked.
        oddities: what honest trainers do not write, such as modules of two base models.
        tensors_unread: how many tensors no norm, hash or verdict covers.
    """

    base: str
    evidence: str
    modules: dict[str, int]
    methods: dict[str, int]
    ranks: dict[str, int]
    scales: dict[str, int]
    norm: float
    norms: dict[str, float]
    warnings: tuple[str, ...]
    claims: dict[str, str]
    oddities: tuple[str, ...] = ()
    tensors_unread: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; for one release also under the old name of a key."""
        return {**vars(self), "odd": self.warnings}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AdapterSummary":
        """Inverse of `to_dict`, also after JSON and of files that say `odd`."""
        plain = dict(data)
        old = plain.pop("odd", ())
        lists = {"warnings": plain.get("warnings", old), "oddities": plain.get("oddities", ())}
        return cls(**{**plain, **{name: tuple(found) for name, found in lists.items()}})


def summarize(
    file: AdapterFile,
    adapter: Adapter | None = None,
    sizes: Float[np.ndarray, " modules"] | None = None,
) -> AdapterSummary:
    """Facts of an adapter.

    Args:
        file: its header: counts are of all its modules.
        adapter: what was read of it: scales and norms are of these; None for the header alone.
        sizes: norms of its modules, where they are known.
    """
    structure = file.structure
    read = list(adapter.modules.values()) if adapter else []
    found = sizes
    if found is None:
        found = module_norms((m.name, *m.factors, m.scale) for m in read)
    norms = {printable(m.name): float(norm) for m, norm in zip(read, found, strict=True)}
    return AdapterSummary(
        base=file.base.name,
        evidence=printable(file.base.evidence),
        modules=dict(structure.components),
        methods=dict(structure.methods),
        ranks=dict(structure.ranks),
        scales=dict(Counter(f"{m.scale:g} ({m.scale_source})" for m in read)),
        norm=float(np.sqrt(sum(norm**2 for norm in norms.values()))),
        norms=norms,
        warnings=tuple(_warnings(structure, norms)),
        oddities=tuple(_oddities(file)),
        tensors_unread=len(structure.unread),
        claims={
            _cut(printable(name)): _cut(printable(value))
            for name, value in file.header.metadata.items()
            if name.startswith(CLAIMS)
        },
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_CLAIM else f"{text[:LONGEST_CLAIM]}…"


def _oddities(file: AdapterFile) -> Iterator[str]:
    if odd := file.base.odd:
        such = f"such as {shown(odd[0])}"
        yield f"{len(odd)} modules are of another base model than the others, {such}"
    if unknown := file.structure.unmapped:
        such = f"such as {shown(unknown[0])}"
        yield f"{len(unknown)} tensors are of modules or methods that are not known, {such}"


def _warnings(structure: Structure, norms: dict[str, float]) -> list[str]:
    notes = []
    if silent := [name for name, norm in norms.items() if norm == 0]:
        notes.append(f"{len(silent)} modules have no effect, such as {shown(silent[0])}")
    if directions := [entry for entry in structure.entries if entry.needs_base]:
        notes.append(f"{len(directions)} modules are of DoRA: their size needs the base model")
    if others := (*structure.other_keys, *structure.unmapped):
        notes.append(f"{len(others)} tensors are no part of an update, such as {shown(others[0])}")
    if encoders := structure.other_encoders:
        notes.append(
            f"{len(encoders)} tensors are of a text encoder that is not read, such as "
            f"{shown(encoders[0])}"
        )
    return notes
