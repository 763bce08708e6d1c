"""`lora-ws inspect` and `convert`: what a file holds, and the same as another file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_ws.adapters import Adapter, read_adapter
from lora_ws.adapters.bases import Base, detect_base
from lora_ws.adapters.header import read_header
from lora_ws.adapters.reader import locate, outline_of
from lora_ws.adapters.source import LocalSource
from lora_ws.adapters.writer import Spelling, write_adapter
from lora_ws.functional.sketch import update_norm

# Facts of training that files claim; other entries are listed by name.
CLAIMS = ("ss_", "modelspec.", "lora_adapter_metadata")
LONGEST_CLAIM = 120


def inspect(file: str, /, *, as_json: bool = False) -> None:
    """Show what an adapter file is: base model, method, ranks, scales, norms, and what is odd.

    Args:
        file: a .safetensors file or a PEFT folder
        as_json: print one JSON object instead of tables.
    """
    adapter = read_adapter(file)
    facts = describe(adapter, base_of(file))
    if as_json:
        print(json.dumps(facts))  # noqa: T201
        return
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False)
    for name in ("file", "sha256", "base", "evidence", "modules", "methods", "ranks", "scales"):
        value = facts[name]
        text = (
            ", ".join(f"{v} x {k}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        table.add_row(name, escape(str(text)))
    table.add_row("norm", f"{facts['norm']:.4g}")
    console.print(table)
    for note in facts["odd"]:
        console.print(f"note: {escape(note)}")
    if facts["claims"]:
        console.print("\nThe file claims, unchecked:")
        for name, value in facts["claims"].items():
            console.print(f"  {escape(name)}: {escape(value)}")


def convert(file: str, out: str, /, *, to: Spelling) -> None:
    """Write an adapter in another spelling, with the same effective update.

    Args:
        file: a .safetensors file or a PEFT folder
        out: folder of the new file
        to: peft, diffusers or kohya.
    """
    sdxl = base_of(file).name == "SDXL"
    written = write_adapter(read_adapter(file), Path(out), to, sdxl=sdxl)
    print(f"wrote {written}")  # noqa: T201


def base_of(file: str) -> Base:
    """The base model of a file, by its header."""
    source = LocalSource(locate(file)[0])
    return detect_base(outline_of(read_header(source), source.name).entries)


def describe(adapter: Adapter, base: Base) -> dict[str, Any]:
    """Facts of an adapter as plain data.

    Args:
        adapter: read whole.
        base: what `detect_base` said.
    """
    modules = adapter.modules.values()
    norms = {m.name: update_norm([(m.name, m.down, m.up, m.scale)]) for m in modules}
    return {
        "file": adapter.source,
        "sha256": adapter.sha256,
        "base": base.name,
        "evidence": base.evidence,
        "modules": dict(Counter(module.component for module in modules)),
        "methods": dict(Counter(module.method for module in modules)),
        "ranks": dict(Counter(str(module.rank) for module in modules)),
        "scales": dict(Counter(f"{m.scale:g} ({m.scale_source})" for m in modules)),
        "norm": float(np.sqrt(sum(norm**2 for norm in norms.values()))),
        "norms": norms,
        "odd": _odd(adapter, norms),
        "claims": {
            name: value if len(value) <= LONGEST_CLAIM else f"{value[:LONGEST_CLAIM]}…"
            for name, value in adapter.metadata.items()
            if name.startswith(CLAIMS)
        },
    }


def _odd(adapter: Adapter, norms: dict[str, float]) -> list[str]:
    """What a reader of the facts should know."""
    notes = []
    if silent := [name for name, norm in norms.items() if norm == 0]:
        notes.append(f"{len(silent)} modules have no effect, such as {silent[0]}")
    if directions := [m.name for m in adapter.modules.values() if m.needs_base]:
        notes.append(f"{len(directions)} modules are of DoRA: their size needs the base model")
    if adapter.other_keys:
        notes.append(
            f"{len(adapter.other_keys)} tensors are no part of an update, such as "
            f"{adapter.other_keys[0]}"
        )
    return notes
