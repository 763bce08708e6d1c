"""`lora-ws check-reader`: the symmetries of a network, measured beside what it claims."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from sklearn.base import TransformerMixin

from lora_ws.adapters import Layout
from lora_ws.config import parse
from lora_ws.errors import ConfigError
from lora_ws.featurizers import Featurizer, FlatVec
from lora_ws.models import Metanetwork
from lora_ws.models.symmetries import Measured, faults, measure
from lora_ws.report.grid import Cell, Grid, show


@dataclass(frozen=True)
class _Named:
    reader: Metanetwork


def check_reader(
    reader: str,
    /,
    *,
    init_args: dict[str, Any] | None = None,
    featurizer: Featurizer | TransformerMixin | None = None,
    layout: str = "tiny_sd_qv",
    rank: int = 4,
    seed: int = 0,
) -> int:
    """Measure the symmetries of a network: which changes of an adapter leave its outputs the same.

    An untrained network reads random adapters before and after each change. The exit code is 1
    where a claim does not hold, or a symmetry that holds is not claimed.

    Args:
        reader: network, by class name or dotted path
        init_args: arguments of the network, such as '{"width": 16}'; others take their defaults.
        featurizer: representation, for networks that read features; null takes FlatVec.
        layout: layout of the random adapters, by name.
        rank: rank of the random adapters.
        seed: seed of adapters, weights and changes.
    """
    if rank < 1:
        raise ConfigError(f"--rank: expected at least 1, got {rank}")
    named = json.dumps({"class_path": reader, "init_args": init_args or {}})
    model = parse(_Named, ["--reader", named], prog="check-reader")().reader
    if model.reads == "features":
        featurizer = featurizer or FlatVec()
    elif featurizer is not None:
        raise ConfigError(f"--featurizer: {reader} reads the factors themselves; leave it out")
    found = measure(model, Layout.known(layout).at_rank(rank), featurizer, seed)
    console = Console(highlight=False, soft_wrap=True)
    show(console, _grid(found, f"{type(model).__name__}, {layout} at rank {rank}."))
    wrong = faults(found)
    for fault in wrong:
        console.print(fault)
    return 1 if wrong else 0


def _grid(found: list[Measured], caption: str) -> Grid:
    rows = []
    for entry in found:
        moved = "cannot take it" if entry.moved is None else f"{entry.moved:.1e}"
        words = "yes" if entry.claimed else "no", "yes" if entry.unseen else "no"
        cells = (entry.change.name, entry.change.symmetry, moved, *words)
        rows.append(tuple(map(Cell, cells)))
    return Grid(("Change", "Symmetry", "Outputs move", "claimed", "holds"), tuple(rows), caption, 2)
