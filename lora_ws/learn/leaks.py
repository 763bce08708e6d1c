"""What leaks between the parts of a split, or predicts a label without the adapter's content."""

import re
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Num
from scipy.stats import binomtest

from lora_ws.audit.prompt import PromptReader
from lora_ws.audit.prompt_leak import prompt_leak
from lora_ws.collection import AdapterSet, Split
from lora_ws.diffusion.base_spec import BUNDLED
from lora_ws.errors import LoraWsError
from lora_ws.learn.starts import most_rows, start_groups, update_groups
from lora_ws.memory import held_bytes

Verdict = Literal["leak", "note", "clean", "not measured"]
# How an adapter was trained; columns that only some collections have are left out.
RECIPE = (
    "rank",
    "alpha",
    "base",
    "resolution",
    "optimizer",
    "learning_rate",
    "batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "num_batches",
    "num_epochs",
    "num_images",
    "dtype",
)
# What classes consist of: to share it makes a test easier, but is no mistake.
PARTS_OF_CLASSES = ("leaf",)
# Measured on the weights too, whatever a column says.
START = "start"
# Pairs of rows are compared, so rows of large collections are sampled.
MOST_ROWS = 4000
FOLDS, P_VALUE = 5, 0.01


class Finding(NamedTuple):
    """One way in which a test could be easier than it looks.

    Attributes:
        what: what is shared, or predicts the label: ``photos``, ``starts``, ``recipe`` ...
        verdict: leak; note, where a user should know it; clean; not measured.
        found: what was measured, in one sentence.
        advice: what to type or to do; empty where nothing needs to be done.
    """

    what: str
    verdict: Verdict
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self._asdict()


def find_leaks(adapters: AdapterSet) -> list[Finding]:
    """Look for what the parts of a split share, and for what predicts labels besides the weights.

    Args:
        adapters: of one subset, with a label and a split (`AdapterSet.split_by`).

    Returns:
        Columns that tie adapters together, equal starts, near copies, the training recipe, prompts.

    Raises:
        DataError: the collection has no labels or cannot be split.

    Example:
        >>> import lora_ws
        >>> zoo = lora_ws.load("lora-ws-mini", subset="shared/class")
        >>> [(one.what, one.verdict) for one in shared_columns(zoo, zoo.split())]
        [('leaf', 'note'), ('photos', 'clean'), ('start', 'note')]
    """
    split = adapters.split()
    rows = _sample(len(adapters), split, most_rows(adapters.layout, held_bytes()))
    within = Split(*(np.flatnonzero(np.isin(rows, part)) for part in split))
    labels = adapters.labels()[0]
    columns = [one for one in shared_columns(adapters, split) if one.what != START]
    compared = [_starts(adapters, rows, within, labels[rows]), _copies(adapters, rows, within)]
    if len(rows) < len(adapters):
        told = f" (among {len(rows)} of {len(adapters)} rows)"
        compared = [one._replace(found=one.found + told) for one in compared]
    return [
        *columns,
        *compared,
        _recipe(adapters, labels),
        _prompts(adapters, labels),
    ]


def find_prompt_words(zoo: AdapterSet, base: str | None = None) -> Finding:
    """Whether the weights show class words of the training prompts, for an audit.

    Args:
        zoo: labelled adapters of one subset.
        base: of the adapters; None takes the card's where it is bundled, and else asks none.

    Returns:
        The prompt reader's accuracy beside the share of the largest class; a leak where that is no
        chance.
    """
    what, known = "words of prompts", zoo.card.base_model
    base = base or (known if known in BUNDLED else None)
    if base is None:
        told = f"the base, {known or 'which the card does not name'}, is not bundled"
        return Finding(what, "not measured", told, "--base: a folder of the base, or its Hub name")
    try:
        whole = replace(zoo, card=replace(zoo.card, subset="", subsets=()))
        (leak,) = prompt_leak(whole, PromptReader(base))
    except LoraWsError as error:
        return Finding(what, "not measured", str(error))
    except ModuleNotFoundError as error:  # of an extra; all else is measured without it
        advice = "pip install 'lora_ws[diffusion]'"
        return Finding(what, "not measured", f"needs {error.name}", advice)
    found = (
        f"read from weights without training on labels: {100 * leak.top1:.0f} % "
        f"({100 * leak.low:.0f} to {100 * leak.high:.0f}; largest class {100 * leak.chance:.0f} %)"
    )
    if leak.p_value >= P_VALUE:
        return Finding(what, "clean", found)
    advice = "a reader may recognise the word: compare with adapters of a constant prompt"
    return Finding(what, "leak", found, advice)


def shared_columns(adapters: AdapterSet, split: Split) -> list[Finding]:
    """Compare the parts by the columns that the card says tie adapters together; reads no weights.

    Args:
        adapters: whose card names ``group_columns``.
        split: their parts.
    """
    columns = adapters.card.group_columns.items()
    return [_shared(what, name, adapters.column(name), split) for what, name in columns]


def share_seen(values: np.ndarray, split: Split) -> float:
    """Share of test rows with a value that a training row has; of lists, with any of them.

    Example:
        >>> split = Split(np.array([0, 1]), np.array([2]), np.array([3, 4]))
        >>> share_seen(np.array(["a", "b", "c", "a", "d"]), split)
        0.5
    """
    sets = [set(value) if isinstance(value, np.ndarray | list) else {value} for value in values]
    seen = set[Any]().union(*(sets[row] for row in split.train))
    return float(np.mean([not sets[row].isdisjoint(seen) for row in split.test]))


def told_by_group(groups: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> tuple[int, int]:
    """Guess each row's label by the other rows of its group: the hits, and the rows with others.

    Example:
        >>> told_by_group(np.array([0, 0, 0, 1]), np.array([5, 5, 7, 5]))
        (2, 3)
    """
    _, groups = np.unique(groups, return_inverse=True)
    _, labels = np.unique(labels, return_inverse=True)
    counts = np.zeros((groups.max() + 1, labels.max() + 1), np.int64)
    np.add.at(counts, (groups, labels), 1)
    others = counts[groups]
    others[np.arange(len(labels)), labels] -= 1
    tried = others.any(axis=1)
    return int((tried & (others.argmax(axis=1) == labels)).sum()), int(tried.sum())


def told_by_columns(
    table: Num[np.ndarray, "n columns"],
    labels: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None = None,
) -> int:
    """Guess each row's label by a decision tree on held-out folds: the hits.

    Args:
        table: what the tree sees.
        labels: at least five rows of each.
        groups: of rows that stay in one fold; None where each row is its own.

    Example:
        >>> labels = np.repeat([0, 1], 10)
        >>> told_by_columns(labels[:, None], labels)
        20
    """
    # Here, because it is slow to import.
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(FOLDS, shuffle=True, random_state=0)
    tree = DecisionTreeClassifier(min_samples_leaf=FOLDS, random_state=0)
    guessed = cross_val_predict(tree, table, labels, groups=groups, cv=folds)
    return int((np.asarray(guessed) == labels).sum())


def largest_share(labels: Int[np.ndarray, " n"]) -> float:
    """Share of the largest class, which is right as often as naming it.

    Example:
        >>> largest_share(np.array([0, 0, 0, 1]))
        0.75
    """
    return float(np.bincount(labels).max()) / len(labels)


def beats_guessing(hits: int, n: int, labels: Int[np.ndarray, " n"], trials: int = 1) -> bool:
    """Whether so many hits are more than predicting the largest class gives.

    Binomial test, one-sided, at 0.01 over the number of trials.

    Example:
        >>> labels = np.array([0, 1])
        >>> beats_guessing(9, 10, labels), beats_guessing(10, 10, labels)
        (False, True)
    """
    test = binomtest(hits, n, largest_share(labels), alternative="greater")
    return float(test.pvalue) < P_VALUE / trials


def _sample(n: int, split: Split, room: int) -> np.ndarray:
    """At most `MOST_ROWS` rows, or those that there is room for, of every part its share."""
    most = min(MOST_ROWS, room)
    if n <= most:
        return np.sort(np.concatenate(split))
    rng = np.random.default_rng(0)
    parts = [rng.choice(part, size=len(part) * most // n, replace=False) for part in split]
    return np.sort(np.concatenate(parts))


def _shared(what: str, column: str, values: np.ndarray, split: Split) -> Finding:
    lists = isinstance(values[0], np.ndarray | list)
    if not lists and len(set(values.tolist())) == 1:
        return Finding(what, "note", f"all adapters have the same `{column}`")
    share = share_seen(values, split)
    if not share:
        return Finding(what, "clean", f"no test row shares `{column}` with a training row")
    found = f"{100 * share:.0f} % of test rows share `{column}` with a training row"
    verdict = "note" if what in PARTS_OF_CLASSES else "leak"
    return Finding(what, verdict, found, f"--split group:{what}")


def _starts(adapters: AdapterSet, rows: np.ndarray, split: Split, labels: np.ndarray) -> Finding:
    groups = start_groups(adapters.weights, adapters.layout, rows)
    different = len(np.unique(groups))
    if different == 1:
        text = "all adapters began with one A, so raw weights can be compared; those of strangers' "
        return Finding(START, "note", text + "adapters cannot")
    hits, tried = told_by_group(groups, labels)
    share = share_seen(groups, split)
    found = f"{different} starts; {100 * share:.0f} % of test rows have that of a training row"
    if not share and not tried:
        return Finding(START, "clean", found)
    tells = tried and beats_guessing(hits, tried, labels)
    if tells:
        share_told = 100 * hits / tried
        found += f"; the start predicts the label of {share_told:.0f} % of the rows that share one"
    leaks = share > 0 or tells
    column = START if START in adapters.card.group_columns else "COLUMN"
    advice = f"keep adapters of one start in one part: --split group:{column}" if leaks else ""
    return Finding(START, "leak" if leaks else "clean", found, advice)


def _copies(adapters: AdapterSet, rows: np.ndarray, split: Split) -> Finding:
    share = share_seen(update_groups(adapters, rows), split)
    found = f"{100 * share:.0f} % of test rows are nearly copies of training rows"
    if not share:
        return Finding("copies", "clean", "no test row is nearly a copy of a training row")
    return Finding("copies", "leak", found, "keep one of each: lora-ws dedup FOLDER")


def _recipe(adapters: AdapterSet, labels: np.ndarray) -> Finding:
    """Whether the recipe alone predicts the label, by a decision tree on held-out folds."""
    names = [name for name in RECIPE if name in adapters.rows.column_names]
    columns = [np.unique(_plain(adapters.column(name)), return_inverse=True) for name in names]
    varying = [
        (name, codes) for name, (kinds, codes) in zip(names, columns, strict=True) if len(kinds) > 1
    ]
    if not varying:
        return Finding("recipe", "clean", "no recorded setting of training varies")
    if np.unique(labels, return_counts=True)[1].min() < FOLDS:
        return Finding("recipe", "not measured", f"a class has fewer than {FOLDS} rows")
    hits = told_by_columns(np.stack([codes for _, codes in varying], axis=1), labels)
    told = ", ".join(name for name, _ in varying)
    found = f"{told} alone predict {100 * hits / len(labels):.0f} % of labels"
    found += f" (largest class {100 * largest_share(labels):.0f} %)"
    if beats_guessing(hits, len(labels), labels):
        return Finding("recipe", "leak", found, "train every class with the same settings")
    return Finding("recipe", "clean", found)


def _prompts(adapters: AdapterSet, labels: np.ndarray) -> Finding:
    advice = "how much of it can be read: lora-ws data prompt-leak"
    if "prompt" not in adapters.rows.column_names:
        return Finding("prompts", "not measured", "no column `prompt`", advice)
    words = np.array(adapters.labels()[1])[labels]
    prompts = adapters.column("prompt").tolist()
    named = np.mean(
        [
            bool(re.search(rf"\b{re.escape(w)}\b", str(p)))
            for w, p in zip(words, prompts, strict=True)
        ]
    )
    if not named:
        return Finding("prompts", "clean", "no training prompt names the class")
    return Finding(
        "prompts", "leak", f"{100 * named:.0f} % of training prompts name the class", advice
    )


def _plain(values: np.ndarray) -> np.ndarray:
    """Numbers as they are; anything else, and a column with gaps, as text."""
    return values if values.dtype.kind in "iufb" else np.array([str(value) for value in values])
