"""The prompt reader on lora-ws-mini: nothing is trained, and every row is a test row.

For each corner of 500 adapters, one file at a time (no statistic is taken over adapters):

* top-1 and top-3 of the ten class words, with the Wilson interval of top-1; chance is 10 and 30 %;
* top-1 of 60 words, the class words and those of the leaf classes; chance is 1.7 %;
* what `PromptReader.read` says: the share in which "none" is most probable, and in which the word
  is; expected calibration error of the probabilities among the ten words;
* the share in which the right one of nine frames explains the file best;
* mean average precision of text search over the corner, a class word at a time; chance is 10 %.

Goals: top-1 of at least 60 % where the prompt names the class, of at most 13 % where it does not.
"""

import numpy as np
from sklearn.metrics import average_precision_score

from lora_ws.audit.prompt import TEMPERATURE, PromptReader
from lora_ws.audit.prompt_leak import prompt_leak
from lora_ws.collection import AdapterSet, load
from lora_ws.functional.calibrate import reliability

FRAME = "a photo of sks {}"
FRAMES = (
    *(FRAME, "a photo of a {}", "a photo of {}", "photo of sks {}", "sks {}", "a {}", "{}"),
    *("a photo of a sks {}", "a sks {}"),
)
SEEDS = (0, 1, 2)


def main() -> None:
    """Print one table a question."""
    zoo = load("lora-ws-mini")
    names = dict.fromkeys(zoo.column("subset").tolist())
    print("top-1 of ten words by the seed of the noise that the base is shown, %")
    for name in names:
        subset = zoo.subset(name)
        leaks = [prompt_leak(subset, PromptReader(templates=(FRAME,), seed=s))[0] for s in SEEDS]
        print(f"  {name:22s}", *(f"{100 * leak.top1:.1f}" for leak in leaks))
    reader = PromptReader(templates=(FRAME,))
    for name in names:
        report(name, zoo.subset(name), reader)


def report(name: str, zoo: AdapterSet, reader: PromptReader) -> None:
    """Print what is measured of one corner."""
    (leak,) = prompt_leak(zoo, reader)
    labels, classes = zoo.labels()
    own = np.array(classes)[labels]
    leaves = {part for leaf in zoo.column("category_name").tolist() for part in leaf.split("_")}
    every = [*classes, *sorted(leaves - set(classes))]
    scores = reader.scores(zoo, every)
    readings = reader.read(zoo, classes)
    found = np.array([[r.probabilities[c] for c in classes] for r in readings])
    none = np.array([r.none for r in readings])
    ten = np.exp((scores[:, :10] - scores[:, :10].max(1, keepdims=True)) / TEMPERATURE)
    ten /= ten.sum(axis=1, keepdims=True)
    named = np.where(none > found.max(axis=1), "", np.array(classes)[found.argmax(axis=1)])
    searched = [average_precision_score(own == c, found[:, k]) for k, c in enumerate(classes)]
    frames = PromptReader(templates=FRAMES).likelihoods(zoo, classes).max(axis=2).argmax(axis=1)
    facts = {
        "top-1 of ten": f"{100 * leak.top1:.1f} ({100 * leak.low:.1f} to {100 * leak.high:.1f})",
        "top-3 of ten": f"{100 * leak.top3:.1f}",
        f"top-1 of {len(every)}": f"{100 * (np.array(every)[scores.argmax(1)] == own).mean():.1f}",
        "none of these": f"{100 * (named == '').mean():.1f}",
        "named rightly": f"{100 * (named == own).mean():.1f}",
        "named wrongly": f"{100 * ((named != own) & (named != '')).mean():.1f}",
        "calibration error": f"{100 * reliability(ten, labels).error:.1f}",
        "right frame of nine": f"{100 * (frames == 0).mean():.1f}",
        "text search, mAP": f"{100 * np.mean(searched):.1f}",
    }
    print(f"{name}, {leak.adapters} adapters, %")
    for key, value in facts.items():
        print(f"  {key:22s} {value}")


if __name__ == "__main__":
    main()
