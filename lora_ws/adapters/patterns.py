"""Regular expressions out of a file, matched in bounded time.

PEFT names modules in its settings by regular expressions. Python's engine tries one choice after
the other, and a stranger's expression can make it do so for ever. Here all choices are followed at
once: each piece maps the set of positions reached so far to the set reached after it. What is
repeated is always a single character, so that a match costs pieces times positions at most.

Source: K. Thompson, Regular expression search algorithm, Communications of the ACM 11 (1968).
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Text, and positions in it, to positions.
Step = Callable[[str, set[int]], set[int]]

LENGTH, DEPTH = 2000, 16
_ONE = r"(?:[^\\.\[\](){}*+?^$|]|\.|\\[dw]|\\[^\w\s]|\[\^?(?:\w-\w|[\w.]|\\[dw.\-])+\])"
_TOKEN = re.compile(
    rf"(?P<run>(?:{_ONE}(?![*+?]))+)|(?P<one>{_ONE})(?P<times>[*+?])\??"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\)(?P<maybe>\??))|(?P<bar>\|)|(?P<edge>[\^$])"
)


class Pattern(NamedTuple):
    """A pattern that has been checked.

    Attributes:
        step: from where it may begin to where it may end.
        pieces: how many there are: a match costs so many looks at most, at each position.
    """

    step: Step
    pieces: int

    def fits(self, path: str) -> bool:
        """Whether it fits the whole path, or its end after a dot: PEFT's rule."""
        starts = {0, *(dot.end() for dot in re.finditer(r"\.", path))}
        return len(path) in self.step(path, starts)


def parse_pattern(text: str) -> Pattern:
    r"""Check a pattern.

    Args:
        text: characters, ``.``, ``\d``, ``\w``, escaped punctuation and classes, each perhaps with
            ``*``, ``+`` or ``?``; groups of alternatives, perhaps with ``?``; ``^`` and ``$``.

    Raises:
        ValueError: it holds something else, or is too long.

    Example:
        >>> parse_pattern(r"attn\d+\.to_(q|v)").fits("mid_block.attn1.to_q")
        True
        >>> parse_pattern("^attn1").fits("mid_block.attn1")
        False
        >>> parse_pattern("(a+)+")
        Traceback (most recent call last):
        ValueError: at `+`
    """
    if len(text) > LENGTH:
        raise ValueError(f"of {len(text)} characters, at most {LENGTH} are read")
    # Open groups, of alternatives, of steps.
    groups: list[list[list[Step]]] = [[[]]]
    at = pieces = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None or len(groups) > DEPTH or (token["close"] and len(groups) == 1):
            raise ValueError(f"at `{text[at : at + 20]}`")
        at, pieces = token.end(), pieces + 1
        if token["open"]:
            groups.append([[]])
        elif token["bar"]:
            groups[-1].append([])
        elif token["close"]:
            step = _any_of(groups.pop())
            groups[-1][-1].append(_maybe(step) if token["maybe"] else step)
        elif token["edge"]:
            edge = token["edge"]
            groups[-1][-1].append(lambda path, at, e=edge: at & {0 if e == "^" else len(path)})
        else:
            groups[-1][-1].append(_characters(token))
    if len(groups) > 1:
        raise ValueError("a group is not closed")
    return Pattern(_any_of(groups[0]), pieces)


def _characters(token: re.Match[str]) -> Step:
    """A run of single characters, or one that is repeated."""
    try:
        if token["run"]:
            return _run(token["run"])
        once, times = token.group("one", "times")
        return _maybe(_run(once)) if times == "?" else _repeat(once, least=int(times == "+"))
    except re.error as error:
        raise ValueError(f"at `{token[0]}`: {error}") from error


def _run(text: str) -> Step:
    # Without a choice in it, Python's engine only walks along.
    run = re.compile(text)
    return lambda path, at: {found.end() for k in at if (found := run.match(path, k))}


def _repeat(text: str, least: int) -> Step:
    longest = re.compile(f"{text}*")

    def step(path: str, at: set[int]) -> set[int]:
        found: set[int] = set()
        end = -1
        for k in sorted(at):
            # Within the last stretch, which ends where this one would.
            if k <= end:
                continue
            stretch = longest.match(path, k)
            end = stretch.end() if stretch else k
            found.update(range(k + least, end + 1))
        return found

    return step


def _maybe(step: Step) -> Step:
    return lambda path, at: at | step(path, at)


def _any_of(choices: Sequence[Sequence[Step]]) -> Step:
    def step(path: str, at: set[int]) -> set[int]:
        found: set[int] = set()
        for steps in choices:
            reached = at
            for following in steps:
                reached = following(path, reached)
            found |= reached
        return found

    return step
