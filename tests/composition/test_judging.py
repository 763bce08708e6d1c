"""Scores out of free text, and what both orders do to a judge that favours a place."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_ws.composition.judging import (
    Comparison,
    ImageScores,
    PairScores,
    Rate,
    compare,
    parse_scores,
    position_bias,
    question,
    win_rate,
)
from lora_ws.errors import ConfigError, DataError


@dataclass(frozen=True)
class Thing:
    name: str
    triggers: tuple[str, ...]


ELEMENTS = (Thing("hat", ("red hat", "wide brim")), Thing("garden", ("rose garden",)))
EXPECTED = PairScores(ImageScores(7.5, 8.0), ImageScores(6.0, 9.5))

ANSWERS = {
    "as asked": """The hat of picture 1 lacks its brim. 2 roses of picture 2 are blue.

Picture 1: composition quality = 7.5, image quality = 8
Picture 2: composition quality = 6, image quality = 9.5""",
    "a line each": """Picture 1
Composition quality: 7.5
Image quality: 8.0

Picture 2
Composition quality: 6
Image quality: 9.5
Both are good.""",
    "markdown": """### Image 1
- **Composition Quality:** 7.5/10 (the hat is cut)
- **Image Quality:** 8/10
### Image 2
- **Composition Quality:** 6 / 10
- **Image Quality:** 9.5 out of 10""",
    "numbered lists": """Picture 1:
1. Composition quality (0-10): 7.5 points.
2. Image quality (0-10): 8 points.
Picture 2:
1. Composition quality (0-10): 6 points.
2. Image quality (0-10): 9.5 points.""",
    "score below its name": "Picture 1\nComposition\n7.5\nImage quality:\n8/10\n"
    "Picture 2\nComposition\n\n6\nImage quality:\n**9.5**",
    "other order": "Picture 2: image quality 9.5; composition 6\n"
    "Picture 1: image quality 8; composition 7.5",
    "score by score": "Composition quality: picture 1: 7.5, picture 2: 6\n"
    "Image quality: picture 1 = 8, picture 2 = 9.5",
    "sentences": "The composition quality of picture 1 is 7.5 and of picture 2: 6.\n"
    "The image quality of picture 1 is 8. Image quality of picture 2 is 9.5.",
    "json": '{"picture_1": {"composition":7.5,"image":8}, '
    '"picture_2": {"composition":6,"image":9.5}}',
    "pipes and dashes": "PICTURE 1 | Composition – 7.5 | Image — 8\r\n"
    "PICTURE 2 | Composition - 6 | Image - 9.5\r\n",
    "decimal comma": "Picture 1: composition 7,5, image 8\nPicture 2: composition 6, image 9,5",
    "deductions written out": """Picture 1: composition quality: 10 - 1 - 1.5 = 7.5
image quality = 10 − 2 = 8
Picture 2: composition quality: 10-3-1=6, image quality 10 - 0.5 = 9.5""",
    "a change of mind": """Picture 1: composition quality 3, image quality 3.
Picture 2: composition quality 3, image quality 3. On reflection:
Picture 1: composition quality 7.5, image quality 8.
Picture 2: composition quality 6, image quality 9.5.""",
    "thoughts": "<think>Picture 1: composition 1, image quality 1\nPicture 2: composition 1</think>"
    "Picture 1: composition 7.5, image 8\nPicture 2: composition 6, image 9.5",
    "numbers that are none": """Picture 1: 2 hats. Composition quality: 2 elements are missing.
Picture 1: composition quality = 7.5, image quality = 8
Picture 2: 3 roses in its composition. Image quality: 1 deformed hand.
Picture 2: composition quality = 6, image quality = 9.5""",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_scores_are_read_wherever_they_stand(answer: str) -> None:
    assert parse_scores(ANSWERS[answer]) == EXPECTED


HALVES = st.integers(0, 20).map(lambda k: k / 2)


@given(
    st.lists(HALVES, min_size=4, max_size=4),
    st.permutations(range(2)),
    st.permutations(range(2)),
    st.sampled_from(["{} = {:g}", "{}: {:.1f}/10", "**{}**:\n{:g}", "- {} – {:g} points"]),
    st.sampled_from([", ", "\n", "; ", " | "]),
)
def test_any_order_and_style_reads_the_same(
    scores: list[float], places: list[int], aspects: list[int], style: str, between: str
) -> None:
    names = ("composition quality", "image quality")
    between = "\n" if "\n" in style else between
    lines = [
        f"Picture {p + 1}:\n"
        + between.join(style.format(names[a], scores[2 * p + a]) for a in aspects)
        for p in places
    ]
    found = parse_scores("\n".join(lines))
    assert [*found.first, *found.second] == scores


UNREADABLE = {
    "nothing": ("", "composition of picture 1, image of picture 1, composition of picture 2"),
    "refusal": ("I cannot compare these.", "`I cannot compare these.`"),
    "one picture": ("Picture 1: composition 7, image 8", "none for composition of picture 2"),
    "one score": (
        "Picture 1: composition 7\nPicture 2: composition 7",
        "image of picture 1, image of picture 2",
    ),
    "the format, not filled in": (
        question(ELEMENTS),
        "none for composition of picture 1, image of picture 1",
    ),
    "no picture named": ("composition 7, image quality 8, composition 6", "of picture 1"),
    "score or picture": (
        "Picture 1: composition 7, image 1\nPicture 2: composition 7, image 2",
        "image of picture 1",
    ),
    "cut off": (
        "Picture 1: composition 7, image 8\nPicture 2: composition 7, image quality = ",
        "none for image of picture 2",
    ),
    "too much": (
        "Picture 1: composition 11, image 8\nPicture 2: composition 7, image 8",
        "from 0 to 10, got 11 for composition of picture 1",
    ),
    "too little": (
        "Picture 1: composition 7, image 8\nPicture 2: composition 7, image -1",
        "from 0 to 10, got -1 for image of picture 2",
    ),
    "a range": (
        "Picture 1: composition 7-8, image 8\nPicture 2: composition 7, image 8",
        "none for composition of picture 1",
    ),
    "a table": (
        "| | Composition | Image |\n|---|---|---|\n| Picture 1 | 7 | 8 |\n| Picture 2 | 6 | 9 |",
        "expected scores of 2 pictures",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_answer_is_said(case: str) -> None:
    text, expected = UNREADABLE[case]
    with pytest.raises(DataError) as caught:
        parse_scores(text)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_question_names_elements_their_triggers_and_the_rubric() -> None:
    asked = question((*ELEMENTS, Thing("{odd} name", ())))
    for said in ("1. hat: red hat, wide brim", "2. garden: rose garden", "3. {odd} name", "0.5"):
        assert said in asked
    with pytest.raises(ConfigError, match="elements: expected at least 1"):
        question([])


def grey(level: float, side: int = 4) -> Tensor:
    return torch.full((3, side, side), level)


def answer(first: ImageScores, second: ImageScores) -> str:
    return "\n".join(
        f"Picture {k}: composition quality = {s.composition}, image quality = {s.image}"
        for k, s in enumerate((first, second), 1)
    )


def biased(bias: float) -> Callable[[str, Tensor, Tensor], str]:
    """A judge of brightness, who adds points to what is shown first."""

    def judge(prompt: str, first: Tensor, second: Tensor) -> str:
        one, other = (5 + 2 * float(x.mean()) for x in (first, second))
        return answer(ImageScores(one + bias, 8), ImageScores(other, 8))

    return judge


def test_both_orders_are_asked_and_averaged() -> None:
    seen = []

    def judge(prompt: str, first: Tensor, second: Tensor) -> str:
        seen.append((float(first.mean()), float(second.mean())))
        return answer(ImageScores(9, 4), ImageScores(6, 5))

    found = compare(judge, ELEMENTS, grey(0.0), grey(1.0, side=6))
    assert seen == [(0.0, 1.0), (1.0, 0.0)]
    assert found.shown == PairScores(ImageScores(9, 4), ImageScores(6, 5))
    assert found.swapped == PairScores(ImageScores(6, 5), ImageScores(9, 4))
    assert found.first == found.second == ImageScores(7.5, 4.5)


def test_a_favoured_place_cancels_out() -> None:
    rng = torch.Generator().manual_seed(0)
    levels = torch.randint(-4, 5, (60, 2), generator=rng) / 4
    found = [compare(biased(2.5), ELEMENTS, grey(float(a)), grey(float(b))) for a, b in levels]
    better, same = (levels[:, 1] > levels[:, 0]), (levels[:, 1] == levels[:, 0])
    rate = win_rate(found).composition
    assert (rate.wins, rate.ties) == pytest.approx(
        (float(better.double().mean()), float(same.double().mean()))
    )
    uncorrected = win_rate([c.shown for c in found]).composition
    assert uncorrected.wins < rate.wins - 0.2
    assert position_bias(found).composition.wins > 0.8
    fair = [compare(biased(0), ELEMENTS, grey(float(a)), grey(float(b))) for a, b in levels]
    assert win_rate(fair) == win_rate(found)
    bias = position_bias(fair).composition
    assert bias.wins == bias.losses


def test_equals_are_even_and_ties_stand_apart() -> None:
    found = [compare(biased(1), ELEMENTS, grey(0.5), grey(0.5)) for _ in range(3)]
    assert win_rate(found).composition == Rate(0, 1, 0, 3)
    assert win_rate(found).composition.even == 0.5
    assert win_rate([c.shown for c in found]).composition == Rate(0, 0, 1, 3)
    assert win_rate([c.swapped for c in found]).composition == Rate(1, 0, 0, 3)
    assert position_bias(found).composition == Rate(1, 0, 0, 6)
    assert position_bias(found).image == Rate(0, 1, 0, 6)


def test_composition_and_image_are_counted_by_themselves() -> None:
    verdicts = [
        PairScores(ImageScores(5, 5), ImageScores(6, 4)),
        PairScores(ImageScores(5, 5), ImageScores(6, 5)),
        PairScores(ImageScores(5, 5), ImageScores(5, 6)),
        PairScores(ImageScores(5, 5), ImageScores(4, 4)),
    ]
    rates = win_rate(verdicts)
    assert rates.composition == Rate(0.5, 0.25, 0.25, 4)
    assert rates.image == Rate(0.25, 0.25, 0.5, 4)
    assert win_rate([Comparison(v, v) for v in verdicts]) == rates


@pytest.mark.parametrize("counted", [win_rate, position_bias])
def test_no_comparisons_have_no_rate(counted: Callable[[list[Comparison]], object]) -> None:
    with pytest.raises(DataError, match="at least 1, got none"):
        counted([])


def test_a_judge_is_asked_again_until_it_answers() -> None:
    said = ["", "Picture 1: composition 5", answer(ImageScores(1, 2), ImageScores(3, 4)), "?"]
    said += [answer(ImageScores(3, 4), ImageScores(1, 2))]
    found = compare(lambda *_: said.pop(0), ELEMENTS, grey(0), grey(0), attempts=3)
    assert (found.first, found.second, said) == (ImageScores(1, 2), ImageScores(3, 4), [])


def test_a_judge_that_never_answers_is_given_up() -> None:
    asked = []
    with pytest.raises(DataError, match=r"no scores in 4 attempts.*`I would rather not`"):
        compare(lambda *_: asked.append(1) or "I would rather not", ELEMENTS, grey(0), grey(0), 4)
    assert len(asked) == 4


NO_PICTURES = {
    "batch": (torch.zeros(1, 3, 4, 4), r"first: expected .* got shape \[1, 3, 4, 4\]"),
    "one channel": (torch.zeros(1, 4, 4), r"got shape \[1, 4, 4\]"),
    "not finite": (torch.full((3, 4, 4), torch.nan), "0% finite"),
}


@pytest.mark.parametrize("case", NO_PICTURES)
def test_what_is_no_picture_is_refused(case: str) -> None:
    picture, expected = NO_PICTURES[case]
    with pytest.raises(DataError, match=expected):
        compare(biased(0), ELEMENTS, picture, grey(0))


def test_no_attempts_are_refused() -> None:
    with pytest.raises(ConfigError, match="attempts: expected at least 1, got 0"):
        compare(biased(0), ELEMENTS, grey(0), grey(0), attempts=0)
