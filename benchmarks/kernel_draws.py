"""How far the accuracy of kernel readers on lora-ws-mini depends on which adapters are the test.

Ten draws of 400 training and 100 test rows of each own-start subset, 5 folds twice; nothing is
tuned. *photos*: folds of all rows, classes alike; adapters of a subset share no photo. *leaves*:
each fold tests one leaf class of every class, of which no row trains. Accuracy in percent, mean and
standard deviation over draws; the draws share adapters.

With ``--variants 1``: what changes of one argument of ``attn2.to_v, alignment > SVC`` give instead,
on the constant prompt, minus what it gives on the same draw.
"""

from collections.abc import Iterator
from typing import Any

import common
import numpy as np
from sklearn.base import clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.svm import SVC

import lora_ws
from lora_ws import UpdateKernel
from lora_ws.collection import AdapterSet
from lora_ws.models.one_vs_rest import OneVsRestSVC

SUBSETS = ("per_adapter/constant", "per_adapter/class")
FOLDS = 5
ATTN2 = ("*.attn2.to_v",)
SVM = SVC(kernel="precomputed")
READERS: dict[str, tuple[dict[str, Any], Any]] = {
    "left+delta of all layers, equal > SVC": ({"kernel": "left+delta", "weights": "equal"}, SVM),
    "attn2.to_v, alignment > SVC": ({"matrices": ATTN2}, SVM),
    "attn2.to_v, alignf > SVC": ({"matrices": ATTN2, "weights": "alignf"}, SVM),
    "attn2.to_v, alignf > OneVsRestSVC": (
        {"matrices": ATTN2, "weights": "alignf"},
        OneVsRestSVC(),
    ),
    "attn2.to_v, alignf > KernelRidge": (
        {"matrices": ATTN2, "weights": "alignf"},
        KernelRidge(kernel="precomputed"),
    ),
}

BASE, HEAD = READERS["attn2.to_v, alignment > SVC"]
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "attn1.to_v as well": {"matrices": ("*.attn2.to_v", "*.attn1.to_v")},
    "attn2.to_q as well": {"matrices": ("*.attn2.to_v", "*.attn2.to_q")},
    "the right side as well": {"kernel": "left+right+probe"},
    "no probe": {"kernel": "left"},
    "1 probe": {"probes": 1},
    "16 probes": {"probes": 16},
    "whiten 0.03": {"whiten": 0.03},
    "whiten 0.1": {"whiten": 0.1},
    "whiten 0.3": {"whiten": 0.3},
    "not normalized": {"normalize": False},
}


def photos(labels: np.ndarray, repeats: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training and test rows of each fold, classes alike."""
    folds = RepeatedStratifiedKFold(n_splits=FOLDS, n_repeats=repeats, random_state=0)
    yield from folds.split(labels, labels)


def leaves(
    labels: np.ndarray, names: np.ndarray, repeats: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training and test rows of each fold, which tests one leaf class of each class."""
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        own = [rng.permutation(np.unique(names[labels == label])) for label in np.unique(labels)]
        for tested in zip(*own, strict=True):
            held = np.isin(names, tested)
            yield np.flatnonzero(~held), np.flatnonzero(held)


def accuracy(
    adapters: AdapterSet,
    reader: tuple[dict[str, Any], Any],
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
) -> float:
    """Fit a reader on the training rows, and test it, in percent."""
    arguments, head = reader
    kernel = UpdateKernel(layout=adapters.layout, **arguments)
    targets = labels
    if isinstance(head, KernelRidge):
        targets = 2.0 * np.eye(labels.max() + 1)[labels] - 1
    features = kernel.fit(adapters.weights[train], labels[train]).transform(adapters.weights)
    machine: Any = clone(head)
    found = machine.fit(features[train], targets[train]).predict(features[test])
    found = found.argmax(1) if found.ndim == 2 else found
    return 100 * float((found == labels[test]).mean())


def variants(repeats: int, only: str) -> None:
    """Print a row per changed argument."""
    adapters = lora_ws.load("lora-ws-mini").subset(SUBSETS[0])
    labels, _ = adapters.labels()
    names = adapters.column("category_name").astype(str)
    cuts = (list(photos(labels, repeats)), list(leaves(labels, names, repeats)))
    table, base = list[list[str]](), list[np.ndarray]()
    for name, changed in VARIANTS.items():
        if base and only not in name:
            continue
        reader = ({**BASE, **changed}, HEAD)
        found = [np.array([accuracy(adapters, reader, labels, *f) for f in cut]) for cut in cuts]
        base = base or found
        row = [name]
        for own, first in zip(found, base, strict=True):
            row += [_spread(own), "" if own is first else _spread(own - first, "+")]
        table.append(row)
    common.print_table(["argument", "photos", "gain", "leaves", "gain"], table)
    common.facts("scikit-learn")


def _spread(values: np.ndarray, sign: str = "") -> str:
    return f"{np.mean(values):{sign}.1f} ± {np.std(values, ddof=1):.1f}"


def main() -> None:
    """Measure, and print a row per reader."""
    args = common.arguments(__doc__, repeats=2, only="", variants=0)
    if args.variants:
        variants(args.repeats, args.only)
        return
    names = [name for name in READERS if args.only in name][: 1 if args.quick else None]
    table = {name: [name] for name in names}
    heads = ["reader"]
    for subset in SUBSETS[: 1 if args.quick else None]:
        adapters = lora_ws.load("lora-ws-mini").subset(subset)
        labels, _ = adapters.labels()
        leaf = adapters.column("category_name").astype(str)
        cuts = {
            "photos": list(photos(labels, args.repeats)),
            "leaves": list(leaves(labels, leaf, args.repeats)),
        }
        for cut, folds in cuts.items():
            heads.append(f"{subset}, {cut}")
            for name, cells in table.items():
                found = [accuracy(adapters, READERS[name], labels, *fold) for fold in folds]
                cells.append(_spread(np.array(found)))
    common.print_table(heads, list(table.values()))
    common.facts("scikit-learn")


if __name__ == "__main__":
    main()
