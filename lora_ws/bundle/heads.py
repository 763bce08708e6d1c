"""`Head`: a further prediction of a bundle's network; `Answer`: what it predicts for a file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lora_ws.functional.calibrate import sigmoid, softmax

NO_LABEL = "none of the labels"


@dataclass(frozen=True)
class Answer:
    """What a further head predicts for one adapter.

    Attributes:
        label: the class, the labels that apply, joined, or the number; None where the bundle
            abstains.
        probabilities: calibrated, the most probable first; empty of a number.
        labels: where labels do not exclude each other, those that apply, the most probable first.
        value: the number; None where the head names classes or labels.
    """

    label: str | None
    probabilities: dict[str, float]
    labels: tuple[str, ...] = ()
    value: float | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Answer":
        """Inverse of `dataclasses.asdict`, also after JSON."""
        return cls(**{**data, "labels": tuple(data["labels"])})


@dataclass(frozen=True)
class Head:
    """A further question that a bundle's network answers, in outputs of its own.

    Attributes:
        name: column that it was trained on.
        classes: what its outputs mean; empty of a number.
        temperature: what logits are divided by.
        thresholds: probability of each label from which on it applies; empty where classes exclude
            each other.
        mean: of a number: what an output of 0 is.
        std: of a number: what 1 adds to it.
    """

    name: str
    classes: tuple[str, ...] = ()
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Head":
        """Inverse of `dataclasses.asdict`, also after JSON."""
        tuples = {name: tuple(data[name]) for name in ("classes", "thresholds")}
        return cls(**{**data, **tuples})

    @property
    def outputs(self) -> int:
        """How many outputs are its own."""
        return len(self.classes) or 1

    def answer(self, outputs: Float[np.ndarray, "rows outputs"]) -> list[Answer]:
        """Say of each row what its outputs mean."""
        if not self.classes:
            values = (outputs[:, 0] * self.std + self.mean).tolist()
            return [Answer(f"{value:.3g}", {}, value=value) for value in values]
        shares = (sigmoid if self.thresholds else softmax)(outputs / self.temperature)
        return [self._named(row) for row in shares]

    def _named(self, row: Float[np.ndarray, " outputs"]) -> Answer:
        order, label, labels = named(row, self.classes, self.thresholds)
        return Answer(label, {self.classes[k]: float(row[k]) for k in order}, labels)


def answers_of(
    heads: Sequence[Head],
    outputs: Float[np.ndarray, "rows outputs"],
    abstains: Bool[np.ndarray, " rows"],
) -> list[dict[str, Answer]]:
    """Say of each row what every head means, by its name.

    Args:
        heads: side by side in the outputs.
        outputs: of the heads alone; where they are not finite, they predict nothing.
        abstains: rows without any predicted label.
    """
    outputs = np.where(np.isfinite(outputs), outputs, 0)
    answers: list[dict[str, Answer]] = [{} for _ in abstains]
    start = 0
    for head in heads:
        said = head.answer(outputs[:, start : start + head.outputs])
        start += head.outputs
        for found, answer, silent in zip(answers, said, abstains, strict=True):
            found[head.name] = replace(answer, label=None) if silent else answer
    return answers


def named(
    probabilities: Float[np.ndarray, " names"],
    names: tuple[str, ...],
    thresholds: tuple[float, ...],
) -> tuple[list[int], str, tuple[str, ...]]:
    """Names by probability, the most probable first; what to call the row; the labels that apply.

    Args:
        probabilities: of one row.
        names: of classes, or of labels.
        thresholds: see `Head.thresholds`.
    """
    order = np.argsort(-probabilities).tolist()
    if not thresholds:
        return order, names[order[0]], ()
    labels = tuple(names[k] for k in order if probabilities[k] >= thresholds[k])
    return order, ", ".join(labels) or NO_LABEL, labels
