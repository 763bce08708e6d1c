"""`lora-ws evaluate`: measure a saved classifier on a part of a collection."""

from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lora_ws.bundle import Bundle
from lora_ws.bundle.card import MEASURES, measure_text
from lora_ws.bundle.confidence import ABSTENTIONS, measures
from lora_ws.errors import ConfigError, DataError
from lora_ws.learn.features import open_data
from lora_ws.learn.spec import ExperimentSpec
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
        model: folder of a bundle, or its Hub repository.
        dataset: a collection's name, or the folder of a store; null takes what it was trained on.
        subset: a subset of it; null takes what it was trained on, else the card's first.
        label: column to predict; null takes the card's.
        part: which rows; test is the honest one for the collection it was trained on.
        revision: Hub revision of the bundle.
        allow_classes: dotted paths of representations and networks outside this library that it may
            name.
    """
    from lora_ws.learn.tasks import Classification

    bundle = Bundle.from_pretrained(model, revision=revision, allow_classes=allow_classes)
    if bundle.confidence.thresholds:
        raise ConfigError(
            "--model: expected a bundle of classes that exclude each other, got one of labels; its "
            "README.md has its test metrics, and `lora-ws predict` says labels of files"
        )
    made = bundle.training
    same = dataset is None or dataset == made["dataset"]
    subset = subset or (made["subset"] or None if same else None)
    split = made.get("split") or None if same else None
    adapters, subset = open_data(ExperimentSpec(dataset or made["dataset"], subset, split))
    console = Console(highlight=False, soft_wrap=True)
    if (adapters.version, subset) != (made["data_version"], made["subset"]):
        origin = " ".join(filter(None, [made["dataset"], made["subset"]]))
        console.print(f"Note: the bundle was trained on other adapters ({origin}).")
    labels, classes = adapters.labels(label)
    if set(classes) != set(bundle.classes):
        raise DataError(
            f"the bundle names {', '.join(bundle.classes)}; `{adapters.card.name}` has "
            f"{', '.join(classes)}"
        )
    rows = np.arange(len(adapters)) if part == "all" else getattr(adapters.split(label), part)
    meant = np.array([bundle.classes.index(name) for name in classes])[labels[rows]]
    judged = bundle.predict_arrays(adapters.select(rows).weights, adapters.layout)
    found = torch.from_numpy(judged.probabilities), torch.from_numpy(meant)
    values = Classification().fit(meant, bundle.classes).measure(lambda _: found, part).values
    where = f"{adapters.card.name} {subset}".strip()
    console.print(f"{where}, part {part}: {len(rows)} adapters")
    table = Table("metric", "percent", box=None)
    for name in ordered(values):
        table.add_row(name, f"{100 * values[name]:.2f}")
    console.print(table)
    console.print()
    console.print(_believed(measures(judged, meant)))
    if not bundle.confidence.calibration:
        console.print(f"Note: {ABSTENTIONS['uncalibrated']}.")


def _believed(values: dict[str, float | None]) -> Table:
    table = Table("confidence", "value", box=None)
    for name, value in values.items():
        table.add_row(MEASURES[name], measure_text(name, value))
    return table
