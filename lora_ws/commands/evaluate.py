"""`lora-ws evaluate`: measure a saved classifier on a part of a collection."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_ws.bundle import Bundle
from lora_ws.bundle.card import MEASURES, measure_text
from lora_ws.bundle.confidence import ABSTENTIONS, measures
from lora_ws.errors import ConfigError, DataError
from lora_ws.functional.rows import Rows
from lora_ws.learn.labelled import UNKNOWN, open_for, places
from lora_ws.report.metrics import ordered


def evaluate(
    *,
    model: str,
    dataset: str | None = None,
    subset: str | None = None,
    label: str | None = None,
    part: Literal["train", "val", "test", "all"] = "test",
    revision: str | None = None,
    allow_classes: tuple[str, ...] = (),
) -> None:
    """Evaluate a trained classifier on a collection.

    Args:
        model: bundle: a folder or a Hub repository.
        dataset: a collection's name, or the folder of a store, also at an address; null takes the
            training collection.
        subset: subset of the collection; null takes the training subset, else the card's first.
        label: column to predict; null takes the card's.
        part: part of the split; only test rows are unseen in the training collection.
        revision: Hub revision of the bundle.
        allow_classes: dotted paths of representations and networks outside this library that the
            bundle may use.
    """
    from lora_ws.learn.metrics import present_class_metrics

    bundle = Bundle.from_pretrained(model, revision=revision, allow_classes=allow_classes)
    if bundle.confidence.thresholds:
        raise ConfigError(
            "--model: expected a bundle of classes that exclude each other, got one of labels; its "
            "README.md has its test metrics, and `lora-ws predict` says labels of files"
        )
    made = bundle.training
    adapters, subset = open_for(bundle, dataset, subset)
    console = Console(highlight=False, soft_wrap=True)
    if (adapters.version, subset) != (made["data_version"], made["subset"]):
        origin = " ".join(filter(None, [made["dataset"], made["subset"]]))
        console.print(f"Note: the bundle was trained on other adapters ({origin}).")
    labels, classes = adapters.labels(label)
    rows = np.arange(len(adapters)) if part == "all" else getattr(adapters.split(label), part)
    meant = places(bundle.classes, classes)[labels[rows]]
    rows, meant = rows[meant != UNKNOWN], meant[meant != UNKNOWN]
    if not len(rows):
        raise DataError(
            f"the bundle names {', '.join(bundle.classes)}; `{adapters.card.name}` has "
            f"{', '.join(classes)}"
        )
    judged = bundle.predict_arrays(Rows(adapters.weights, rows), adapters.layout)
    scores, truth = torch.from_numpy(judged.probabilities), torch.from_numpy(meant)
    values = present_class_metrics(scores, truth)
    where = f"{adapters.card.name} {subset}".strip()
    console.print(f"{where}, part {part}: {len(rows)} adapters")
    for note in _differing(bundle.classes, classes, meant):
        console.print(escape(note))
    console.print(_measured(values))
    console.print()
    console.print(_believed(measures(judged, meant)))
    if not bundle.confidence.calibration:
        console.print(f"Note: {ABSTENTIONS['uncalibrated']}.")


def _differing(
    known: Sequence[str], asked: Sequence[str], meant: Int[np.ndarray, " rows"]
) -> Iterator[str]:
    """Which classes only the collection has, and which only the bundle."""
    if unknown := [name for name in asked if name not in known]:
        yield f"Note: adapters of {', '.join(unknown)} are left out; the bundle has no such class."
    if absent := [name for k, name in enumerate(known) if k not in meant]:
        yield f"Note: no adapter is of {', '.join(absent)}; averages are over the other classes."


def _measured(values: dict[str, float]) -> Table:
    table = Table("metric", "percent", box=None)
    for name in ordered(values):
        table.add_row(name, "–" if np.isnan(values[name]) else f"{100 * values[name]:.2f}")
    return table


def _believed(values: dict[str, float | None]) -> Table:
    table = Table("confidence", "value", box=None)
    for name, value in values.items():
        table.add_row(MEASURES[name], measure_text(name, value))
    return table
