"""A detector as it was measured, and its card: how it was tested, and what was not."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from lora_ws.audit.policy import Policy
from lora_ws.audit.scan import POLICY
from lora_ws.bundle import Bundle
from lora_ws.learn.confounds import Confound

CARD = "README.md"
# Files that are named of those left out for one reason.
NAMED = 5
TEXT = """
## How it was tested

Each file was judged by a reader that was trained without it and without its copies, near copies and
files of the same start ({groups} groups of {files} files, five folds).

| class | files | groups | correct, % | abstained, % | flagged, % (95 % interval) |
|---|--:|--:|--:|--:|--:|
{rows}
{verdict} `{policy}` flags a file where a class has a probability of at least
{thresholds}; it was chosen on these {harmless_files} files of `{harmless}` to flag at most
{rate:g} % of files like them. `files.csv` has each file's probabilities: look at files that were
named wrongly, as their folder may be wrong.

## What else tells the folders apart

Tried: the start (A before training), and by the files' headers base model, rank, number of modules,
file size, type of numbers, naming of tensors, names of metadata, and settings of training that they
claim (learning rate, optimizer, checkpoint, steps, …); each alone, on held-out files.

{confounds}

## What was not tested

- Files of other sources, trainers, recipes, base models or subjects than those of the folders: the
  folders are all that it knows. Whatever else parts them (a trainer, a rank, a date) may be what it
  reads.
- Other classes: what is like none of the folders gets an abstention at best.
- Files that were made to pass.
{more}"""


class Detector(NamedTuple):
    """What was made, and what was measured on files that the reader had not seen.

    Attributes:
        bundle: trained on all files.
        policy: its thresholds.
        names: of the files.
        labels: number of each file's class.
        groups: of files that were kept together in the folds.
        probabilities: of each file, by a reader that was trained without its group.
        abstained: whether that reader abstained from it.
        starts: how many different starts (A before training) the files have.
        left_out: files that could not be used -> why.
        confounds: facts beside their updates that tell the folders apart.
    """

    bundle: Bundle
    policy: Policy
    names: Sequence[str]
    labels: np.ndarray
    groups: np.ndarray
    probabilities: np.ndarray
    abstained: np.ndarray
    starts: int
    left_out: Mapping[str, str]
    confounds: Sequence[Confound]

    @property
    def caught(self) -> dict[str, float]:
        """Share of each class's files whose probability of it reaches its threshold."""
        return {
            name: float(self._over(name)[self._own(name)].mean()) for name in self.policy.classes
        }

    @property
    def accuracy(self) -> float:
        """Mean over the classes of the share of files that are classified correctly."""
        hits = self.probabilities.argmax(axis=1) == self.labels
        return float(np.mean([hits[self.labels == k].mean() for k in np.unique(self.labels)]))

    @property
    def alarms(self) -> float:
        """Share of harmless files that are flagged."""
        flagged = np.any([self._over(name) for name in self.policy.classes], axis=0)
        harmless = [name not in self.policy.classes for name in self.bundle.classes]
        return float(flagged[np.array(harmless)[self.labels]].mean())

    def _own(self, name: str) -> np.ndarray:
        return self.labels == self.bundle.classes.index(name)

    def _over(self, name: str) -> np.ndarray:
        place = self.bundle.classes.index(name)
        return ~self.abstained & (self.probabilities[:, place] >= self.policy.classes[name])


def detector_card(made: Detector, harmless: str, rate: float, card: str) -> str:
    """Add to a bundle's card how the detector was tested, and what was not.

    Args:
        made: the detector.
        harmless: the class that is not flagged.
        rate: share of its files that may be.
        card: of the bundle.
    """
    classes = made.bundle.classes
    more = [f"- Left out: {one}.\n" for one in told_left_out(made.left_out)]
    if made.starts < len(made.labels):
        more.append(
            f"- Other starts: the {len(made.labels)} files have {made.starts} starts (A before "
            "training).\n"
        )
    thresholds = made.policy.classes.items()
    return card + TEXT.format(
        groups=len(np.unique(made.groups)),
        files=len(made.labels),
        policy=POLICY,
        rows="".join(_row(made, name, harmless) for name in classes),
        verdict=verdict(made),
        thresholds=", ".join(f"{least:.3f} (`{name}`)" for name, least in thresholds),
        harmless=harmless,
        harmless_files=int((made.labels == classes.index(harmless)).sum()),
        rate=100 * rate,
        confounds="\n".join(f"- {one}." for one in made.confounds) or "None of them does.",
        more="".join(more),
    )


def told_left_out(left_out: Mapping[str, str]) -> list[str]:
    """Say which files were left out, by reason, the most frequent first.

    Args:
        left_out: file -> reason.

    Example:
        >>> told_left_out({"a": "a pickle", "b": "a pickle"})
        ['a, b: a pickle']
    """
    reasons: dict[str, list[str]] = {}
    for name, why in sorted(left_out.items()):
        reasons.setdefault(why, []).append(name)
    said = []
    for why, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        rest = f" and {len(names) - NAMED} more" if names[NAMED:] else ""
        said.append(f"{', '.join(names[:NAMED])}{rest}: {why}")
    return said


def verdict(made: Detector) -> str:
    """Say whether the reader tells the folders apart, counting groups, not files."""
    chance = 1 / len(made.bundle.classes)
    groups = len(np.unique(made.groups))
    wins = round(made.accuracy * groups)
    said = (
        f"Mean accuracy of the classes {100 * made.accuracy:.1f} % (chance {100 * chance:.1f} %)."
    )
    if binomtest(wins, groups, chance, alternative="greater").pvalue > 0.01:
        return f"{said} That is no better than guessing: do not use it; add files."
    return said


def _row(made: Detector, name: str, harmless: str) -> str:
    own = made.labels == made.bundle.classes.index(name)
    files, right = int(own.sum()), (made.probabilities.argmax(axis=1) == made.labels)[own].mean()
    share = made.alarms if name == harmless else made.caught[name]
    interval = binomtest(round(share * files), files).proportion_ci()
    flagged = f"{100 * share:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    groups = len(np.unique(made.groups[own]))
    abstained = 100 * made.abstained[own].mean()
    return f"| {name} | {files} | {groups} | {100 * right:.1f} | {abstained:.1f} | {flagged} |\n"
