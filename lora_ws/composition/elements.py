"""What an adapter of the small testbed adds to an image of a digit, and a judge that looks for it.

Eleven elements in the five categories of ComposLoRA. A character is a digit that the prompt does
not name; the others change how any digit looks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from lora_ws.config import nearest
from lora_ws.errors import ConfigError

SIZE = 16
# Every fifth image is kept from training, to measure the judge.
HELD_OUT = 5
# Joins names of elements that an image shows at once.
_AND = "+"
Pictures = Float[Tensor, "n 3 height width"]


@dataclass(frozen=True)
class Element:
    """Something that can be seen in an image.

    Attributes:
        category: category of ComposLoRA.
        says: description of the element.
        digit: that a character is; empty for the others.
        draw: what it does to images from -1 to 1.
    """

    category: str
    says: str
    digit: str = ""
    draw: Callable[[Pictures], Pictures] = lambda pictures: pictures


def _striped(pictures: Pictures) -> Pictures:
    dark = (torch.arange(pictures.shape[-2]) % 4 < 2)[:, None]
    return torch.where(dark, 0.25 * pictures - 0.75, pictures)


def _bold(pictures: Pictures) -> Pictures:
    return functional.max_pool2d(pictures, 3, 1, 1)


def _outline(pictures: Pictures) -> Pictures:
    return (_bold(pictures) - pictures - 1).clamp(-1, 1)


def _lit(pictures: Pictures) -> Pictures:
    light = torch.linspace(-1, 0.2, pictures.shape[-2])[:, None]
    return torch.maximum(pictures, light.expand_as(pictures))


def _dotted(pictures: Pictures) -> Pictures:
    dotted = pictures.clone()
    dotted[..., 1:4, 1:4] = 1
    return dotted


def _turned(draw: Callable[[Pictures], Pictures]) -> Callable[[Pictures], Pictures]:
    return lambda pictures: draw(pictures.transpose(-1, -2)).transpose(-1, -2)


def _opposite(draw: Callable[[Pictures], Pictures]) -> Callable[[Pictures], Pictures]:
    return lambda pictures: draw(pictures.flip(-1, -2)).flip(-1, -2)


# In the order in which they are drawn: strokes first, what lies behind and before them last.
ELEMENTS: dict[str, Element] = {
    "zero": Element("character", "the digit zero", "zero"),
    "three": Element("character", "the digit three", "three"),
    "seven": Element("character", "the digit seven", "seven"),
    "bold": Element("style", "bold strokes", draw=_bold),
    "outline": Element("style", "outlined strokes", draw=_outline),
    "hoops": Element("clothing", "strokes striped across", draw=_striped),
    "pinstripes": Element("clothing", "strokes striped along", draw=_turned(_striped)),
    "footlight": Element("background", "light from below", draw=_lit),
    "sidelight": Element("background", "light from the right", draw=_turned(_lit)),
    "sun": Element("object", "a dot, upper left", draw=_dotted),
    "ball": Element("object", "a dot, lower right", draw=_opposite(_dotted)),
}


def render(digits: Pictures, names: Sequence[str]) -> Pictures:
    """Draw elements into images of digits; characters must be in the images already."""
    for name, element in ELEMENTS.items():
        if name in names:
            digits = element.draw(digits)
    return digits


@dataclass(frozen=True, eq=False)
class ElementJudge:
    """Says which elements images show: a support-vector machine for each category.

    Attributes:
        machines: category -> machine of scikit-learn, whose classes are names of elements, joined
            by + where all of a category are shown, or "".
        accuracy: category -> share of rendered images of digits not seen in training that it
            sorts right.
    """

    machines: dict[str, Any]
    accuracy: dict[str, float]

    @classmethod
    def train(
        cls,
        digits: Pictures,
        labels: Sequence[str],
        through: Callable[[Pictures], Pictures] = lambda pictures: pictures,
        *,
        together: str = "",
        seed: int = 0,
    ) -> "ElementJudge":
        """Fit it to digits with elements of every category drawn in at random, or none.

        Args:
            digits: images of plain digits, of many hands.
            labels: name of the digit of each.
            through: what all images pass before they are judged, such as an autoencoder.
            together: category whose elements images may show all at once; else one of each.
            seed: of the draw.
        """
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(digits))
        digits = digits[order]
        drawn = {"character": np.array(labels)[order]}
        for category in dict.fromkeys(e.category for e in ELEMENTS.values() if not e.digit):
            choices = ["", *(n for n, e in ELEMENTS.items() if e.category == category)]
            choices += [_AND.join(choices[1:])] * (category == together)
            drawn[category] = rng.choice(choices, len(digits))
        sets = zip(digits, *drawn.values(), strict=True)
        pictures = torch.stack(
            [render(picture, _AND.join(names).split(_AND)) for picture, *names in sets]
        )
        pixels = _pixels(through(pictures))
        held = np.arange(len(digits)) % HELD_OUT == 0
        machines = {
            category: SVC(gamma="scale", C=10).fit(pixels[~held], names[~held])
            for category, names in drawn.items()
        }
        accuracy = {
            category: float(machine.score(pixels[held], drawn[category][held]))
            for category, machine in machines.items()
        }
        return cls(machines, accuracy)

    def shown(self, pictures: Pictures, name: str) -> Bool[np.ndarray, " n"]:
        """Whether each image, from -1 to 1, shows an element.

        Raises:
            ConfigError: there is no such element.
        """
        if name not in ELEMENTS:
            raise ConfigError(f"element: there is no `{name}`{nearest(name, list(ELEMENTS))}")
        said = self.machines[ELEMENTS[name].category].predict(_pixels(pictures))
        return np.array([name in one.split(_AND) for one in said])

    def digits(self, pictures: Pictures) -> list[str]:
        """The digit that each image shows, whatever elements are in it."""
        return self.machines["character"].predict(_pixels(pictures)).tolist()


def _pixels(pictures: Pictures) -> Float[np.ndarray, "n pixels"]:
    grey = functional.interpolate(pictures.mean(1, keepdim=True), (SIZE, SIZE), mode="area")
    return (grey.flatten(1).cpu().numpy() + 1) / 2
