"""Two pictures of the same adapters, judged side by side by whoever can see.

After Zhong et al. 2024, section 4.2: a judge that sees both pictures scores each for composition
and for image quality. Judges favour a place (one of their methods wins 60 % of the pairs shown
second and 51 % shown first), so every pair is shown in both orders and the scores are averaged.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.errors import ConfigError, DataError, old_names

BEST = 10.0
Picture = Float[Tensor, "3 height width"]
Judge = Callable[[str, Picture, Picture], str]
__getattr__ = old_names(__name__, {"Scores": f"{__name__}:ImageScores"})


class Wanted(Protocol):
    """Something that a picture is to show."""

    @property
    def name(self) -> str:
        """What it is."""
        ...

    @property
    def triggers(self) -> Sequence[str]:
        """Phrases of the prompt that call for it, which describe it."""
        ...


class ImageScores(NamedTuple):
    """Of one picture, from 0 to 10.

    Attributes:
        composition: whether all elements are there, as described, and fit together.
        image: how well it is drawn.
    """

    composition: float
    image: float


class PairScores(NamedTuple):
    """Scores of the two pictures of a pair.

    Attributes:
        first: of the first picture.
        second: of the second.
    """

    first: ImageScores
    second: ImageScores


@dataclass(frozen=True)
class Comparison:
    """What a judge said of two pictures in both orders.

    Attributes:
        shown: where the first picture was shown first.
        swapped: where the second was; its fields are of the same pictures as those of ``shown``.
    """

    shown: PairScores
    swapped: PairScores

    @property
    def first(self) -> ImageScores:
        """Of the first picture, averaged over both orders."""
        return _mean(self.shown.first, self.swapped.first)

    @property
    def second(self) -> ImageScores:
        """Of the second picture, averaged over both orders."""
        return _mean(self.shown.second, self.swapped.second)


@dataclass(frozen=True)
class Rate:
    """How often one of two was better, as shares of all pairs that sum to 1.

    Attributes:
        wins: it scored strictly higher.
        ties: both scored the same.
        losses: it scored strictly lower.
        pairs: how many there are.
    """

    wins: float
    ties: float
    losses: float
    pairs: int

    @property
    def even(self) -> float:
        """Wins and half of the ties: 0.5 for equals, whether or not a judge avoids ties."""
        return self.wins + self.ties / 2


class Rates(NamedTuple):
    """By both scores.

    Attributes:
        composition: by composition.
        image: by image quality.
    """

    composition: Rate
    image: Rate


RUBRIC = """\
Two pictures were made from one request, by two different means. Score each of them against the
request.

The request asks for these elements, each with the words that describe it:
{elements}

Each picture gets two scores. Both run from 0 to 10 in steps of 0.5, start at 10 and lose points.

Composition quality: is every element there, is it as described, do they belong together?
  3 points for every element that is missing or is something else,
  1 point for every described feature that is missing or wrong,
  1 point where elements are slightly out of harmony.

Image quality: is it well drawn, whatever it shows?
  3 points for every deformed thing, be it a face, a limb or an object,
  2 points for every problem of texture, of lighting or of colour,
  1 point for every small flaw.

No score goes below 0. Weigh small differences rather than give both pictures the same score. The
order of the pictures means nothing.

First say in a few words what costs each picture points. Then end with these two lines, a number in
place of every <score>, and nothing after them:
Picture 1: composition quality = <score>, image quality = <score>
Picture 2: composition quality = <score>, image quality = <score>"""


def question(elements: Sequence[Wanted]) -> str:
    """What a judge is asked about two pictures that are to show these elements.

    Raises:
        ConfigError: there are no elements.
    """
    if not elements:
        raise ConfigError("elements: expected at least 1 that the pictures are to show, got none")
    lines = [
        f"{number}. {element.name}: {', '.join(element.triggers) or element.name}"
        for number, element in enumerate(elements, 1)
    ]
    return RUBRIC.format(elements="\n".join(lines))


_NUMBER = r"(?>-?\d+(?:[.,]\d+)?)"
# Deductions may be written out; what they leave counts.
_SUM = rf"(?:(?:{_NUMBER}\s*[-+]\s*)+{_NUMBER}\s*=\s*)?"
# A number is a score where a line or clause ends: "composition: 2 hats are missing" has none.
_END = (
    r"(?=[ \t]*(?:/[ \t]*10\b|out of 10\b|points?\b)?[ \t]*"
    r"(?:$|[,;|(){}\[\]]|and\b|-[ \t]*[^\d\s]|\.\s*(?:$|(?=composition|image|picture))))"
)
_SCORE = rf"(?:(?:[ \t]+(?:is|of))?[ \t:=-]*?{_SUM}(?P<here>{_NUMBER}){_END}"
_SCORE += rf"|[ \t:=-]*\n\s*(?P<below>{_NUMBER})(?=[ \t]*(?:/[ \t]*10)?[ \t]*$))?"
_PART = re.compile(
    r"(?:\b(?:picture|image|photo)[ \t]*(?P<place>[12])\b(?![.,]\d|[ \t]*/)"
    r"|\b(?P<aspect>composition|image)(?:[ \t]+quality)?(?:[ \t]+(?:score|rating))?)" + _SCORE,
    re.IGNORECASE | re.MULTILINE,
)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_SCALE = re.compile(r"\((?:0[ \t]*(?:-|to)|out of)[ \t]*10\)")


def parse_scores(text: str) -> PairScores:
    r"""Read a judge's scores, wherever they stand; the last ones where it changes its mind.

    Args:
        text: of several lines, in Markdown, by picture or by score, in any order.

    Raises:
        DataError: a score is missing, or is not from 0 to 10.

    Example:
        >>> parse_scores("**Picture 2**: image 8, composition 6.5\n"
        ...              "**Picture 1**\n- Composition quality: 7/10\n- Image quality: 9/10")
        PairScores(first=ImageScores(composition=7.0, image=9.0),
                   second=ImageScores(composition=6.5, image=8.0))
    """
    lines = _THOUGHT.sub(" ", text).splitlines()
    plain = re.sub(r"[*_`#\"]", " ", "\n".join(lines))
    plain = _SCALE.sub(" ", re.sub("[−–—]", "-", plain))
    found, place, aspect = dict[tuple[str, str], float](), "", ""
    for part in _PART.finditer(plain):
        place, aspect = part["place"] or place, (part["aspect"] or aspect).lower()
        score = part["here"] or part["below"]
        if score and place and aspect:
            found[place, aspect] = float(score.replace(",", "."))
    asked = [(place, aspect) for place in "12" for aspect in ImageScores._fields]
    if missing := [key for key in asked if key not in found]:
        names = ", ".join(f"{aspect} of picture {place}" for place, aspect in missing)
        raise DataError(
            f"expected scores of 2 pictures, got none for {names} in {_excerpt(text)}; ask again"
        )
    if wrong := [key for key in asked if not 0 <= found[key] <= BEST]:
        place, aspect = wrong[0]
        raise DataError(
            f"expected scores from 0 to 10, got {found[wrong[0]]:g} for {aspect} of picture "
            f"{place}; ask again"
        )
    first, second = (
        ImageScores(*(found[place, aspect] for aspect in ImageScores._fields)) for place in "12"
    )
    return PairScores(first, second)


def compare(
    judge: Judge,
    elements: Sequence[Wanted],
    first: Picture,
    second: Picture,
    attempts: int = 10,
) -> Comparison:
    """Have two pictures judged in both orders.

    Args:
        judge: takes a prompt and two pictures, and returns text; asked at least twice.
        elements: what the pictures are to show.
        first: from -1 to 1 ``[3, height, width]``.
        second: likewise, of any size.
        attempts: how often an order is asked until the answer holds all scores.

    Raises:
        ConfigError: no elements, or no attempts.
        DataError: a picture is none, or no answer of any attempt held all scores.
    """
    if attempts < 1:
        raise ConfigError(f"attempts: expected at least 1, got {attempts}")
    for name, picture in (("first", first), ("second", second)):
        if picture.ndim != 3 or len(picture) != 3 or not bool(picture.isfinite().all()):
            raise DataError(
                f"{name}: expected a picture of finite numbers [3, height, width], got shape "
                f"{list(picture.shape)} of {torch.isfinite(picture).double().mean():.0%} finite"
            )
    prompt = question(elements)
    shown = _ask(judge, prompt, first, second, attempts)
    swapped = _ask(judge, prompt, second, first, attempts)
    return Comparison(shown, _swap(swapped))


def win_rate(comparisons: Sequence[Comparison] | Sequence[PairScores]) -> Rates:
    """How often the second of two pictures is better.

    Args:
        comparisons: by averaged scores; pairs in one order give the rate that is not corrected
            for it.

    Raises:
        DataError: there are none.

    Example:
        >>> win_rate([PairScores(ImageScores(7, 9), ImageScores(8, 9))]).composition
        Rate(wins=1.0, ties=0.0, losses=0.0, pairs=1)
    """
    if not comparisons:
        raise DataError("comparisons: expected at least 1, got none")
    gains = [
        (x.second.composition - x.first.composition, x.second.image - x.first.image)
        for x in comparisons
    ]
    composition, image = (_rate(of) for of in zip(*gains, strict=True))
    return Rates(composition, image)


def position_bias(comparisons: Sequence[Comparison]) -> Rates:
    """How often what is shown first is better, over both orders: as often as not by a fair judge.

    Raises:
        DataError: there are no comparisons.
    """
    return win_rate([v for c in comparisons for v in (_swap(c.shown), c.swapped)])


def _ask(judge: Judge, prompt: str, first: Picture, second: Picture, attempts: int) -> PairScores:
    for left in reversed(range(attempts)):
        text = judge(prompt, first, second)
        try:
            return parse_scores(text)
        except DataError as error:
            if not left:
                raise DataError(
                    f"a judge gave no scores in {attempts} attempts; the last time: {error}"
                ) from error
    raise AssertionError


def _swap(pair: PairScores) -> PairScores:
    return PairScores(pair.second, pair.first)


def _mean(one: ImageScores, other: ImageScores) -> ImageScores:
    composition, image = ((a + b) / 2 for a, b in zip(one, other, strict=True))
    return ImageScores(composition, image)


def _rate(gains: Sequence[float]) -> Rate:
    pairs = len(gains)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Rate(wins / pairs, (pairs - wins - losses) / pairs, losses / pairs, pairs)


def _excerpt(text: str) -> str:
    words = " ".join(text.split())
    return f"`…{words[-80:]}`" if len(words) > 80 else f"`{words}`"
