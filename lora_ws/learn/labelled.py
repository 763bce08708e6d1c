"""Labelled rows that a trained classifier can be measured on."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lora_ws.bundle import Bundle
from lora_ws.collection import AdapterSet
from lora_ws.learn.features import open_data
from lora_ws.learn.spec import ExperimentSpec

# Number of a class that the bundle does not name.
UNKNOWN = -1


def open_for(bundle: Bundle, dataset: str | None, subset: str | None) -> tuple[AdapterSet, str]:
    """Open the collection asked for; what is not said is as in training, if it is the same one.

    Args:
        bundle: says what it was trained on.
        dataset: a collection; None takes the training collection.
        subset: its subset; None takes that of training, else the card's first.

    Returns:
        The collection, with the split of training if it is the same one, and the subset's name.
    """
    made = bundle.training
    same = dataset is None or dataset == made["dataset"]
    subset = subset or (made["subset"] or None if same else None)
    split = made.get("split") or None if same else None
    return open_data(ExperimentSpec(dataset or made["dataset"], subset, split))


def places(known: Sequence[str], asked: Sequence[str]) -> Int[np.ndarray, " asked"]:
    """Find the bundle's number of each class of the collection, or `UNKNOWN`.

    Example:
        >>> places(("cat", "dog"), ("dog", "fish")).tolist()
        [1, -1]
    """
    numbers = {name: k for k, name in enumerate(known)}
    return np.array([numbers.get(name, UNKNOWN) for name in asked])
