"""Digits: scikit-learn's images of them, and a judge of those that ``digit-sd`` draws."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from lora_ws.errors import ConfigError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Every fifth image is kept from training, to measure the judge.
HELD_OUT = 5


def check_digits(names: Iterable[str]) -> None:
    """Refuse what is no name of a digit.

    Raises:
        ConfigError: one is not.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ConfigError(f"digits: expected {', '.join(NAMES)}, got `{unknown[0]}`")


def digit_pictures(size: int) -> tuple[Float[Tensor, "n 3 size size"], Int[np.ndarray, " n"]]:
    """All 1797 handwritten digits of scikit-learn.

    Args:
        size: pixels per side that they are scaled to.

    Returns:
        Images from -1 to 1, and which digits they show.
    """
    bunch: Any = load_digits()
    grey = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
    scaled = functional.interpolate(grey, size=(size, size), mode="bilinear")
    return scaled.expand(-1, 3, -1, -1) * 2 - 1, np.asarray(bunch.target)


@dataclass(frozen=True, eq=False)
class DigitJudge:
    """A fitted judge.

    Attributes:
        machine: of scikit-learn.
        accuracy: on real digits that it has not seen.
    """

    machine: Any
    accuracy: float

    @classmethod
    def train(cls) -> "DigitJudge":
        """Fit it; takes a fraction of a second."""
        pixels, labels = load_digits(return_X_y=True)
        held = np.arange(len(labels)) % HELD_OUT == 0
        machine = SVC(gamma="scale", C=10).fit(pixels[~held] / 16, labels[~held])
        return cls(machine, float(machine.score(pixels[held] / 16, labels[held])))

    def digits(self, images: Float[Tensor, "n 3 height width"]) -> Int[np.ndarray, " n"]:
        """The digits that images from -1 to 1 show."""
        grey = functional.interpolate(images.mean(1, keepdim=True), (8, 8), mode="area")
        return self.machine.predict((grey.flatten(1).numpy() + 1) / 2)
