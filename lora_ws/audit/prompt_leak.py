"""How much of a collection's labels can be read from the prompts of training alone."""

from typing import Any, NamedTuple

from scipy.stats import binomtest

from lora_ws.audit.prompt import PromptReader
from lora_ws.collection import AdapterSet

CONFIDENCE = 0.95


class Leak(NamedTuple):
    """What the prompt reader, which has seen no label, says of the labels of a subset.

    Attributes:
        subset: its name; empty where the collection has none.
        adapters: how many were read.
        top1: share whose class word is the most likely of all class words.
        low: lower end of the Wilson interval of ``top1``, at 95 %.
        high: its upper end.
        top3: share whose class word is among the three most likely.
        chance: share of the largest class.
        p_value: of as many hits by chance (exact binomial test, one-sided).
    """

    subset: str
    adapters: int
    top1: float
    low: float
    high: float
    top3: float
    chance: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self._asdict()


def prompt_leak(zoo: AdapterSet, reader: PromptReader, label: str | None = None) -> list[Leak]:
    """Name the class word in each adapter's prompt, and count how often it is its label.

    A reader of weights that does better where this is far above chance may owe it to the prompt.
    Close to chance, the class word does not stand in the prompt in one of the reader's frames.

    Args:
        zoo: labelled adapters; its subsets are measured apart.
        reader: with the collection's base and the frames of its prompts.
        label: column whose values are looked for; None takes the card's label.

    Raises:
        ConfigError: a class is no word of the base.
        AdapterError: queries of cross-attention are not adapted.
    """
    column = zoo.card.subset
    names = dict.fromkeys(zoo.column(column).tolist()) if column else [""]
    return [_measure(name, zoo.subset(name) if name else zoo, reader, label) for name in names]


def _measure(name: str, zoo: AdapterSet, reader: PromptReader, label: str | None) -> Leak:
    labels, classes = zoo.labels(label)
    scores = reader.scores(zoo, classes)
    own = scores[range(len(zoo)), labels]
    before = (scores > own[:, None]).sum(axis=1)
    chance = max((labels == k).mean() for k in range(len(classes)))
    test = binomtest(int((before == 0).sum()), len(zoo), chance, alternative="greater")
    share = binomtest(test.k, len(zoo)).proportion_ci(CONFIDENCE, "wilson")
    top3 = float((before < 3).mean())
    return Leak(
        name,
        len(zoo),
        test.k / len(zoo),
        float(share.low),
        float(share.high),
        top3,
        float(chance),
        float(test.pvalue),
    )
