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

import common
import numpy as np
from scipy.special import softmax
from sklearn.metrics import average_precision_score

from lora_ws.audit.prompt import TEMPERATURE, PromptReader
from lora_ws.audit.prompt_leak import prompt_leak
from lora_ws.collection import AdapterSet, load
from lora_ws.functional.calibrate import expected_calibration_error

FRAME = "a photo of sks {}"
FRAMES = (
    *(FRAME, "a photo of a {}", "a photo of {}", "photo of sks {}", "sks {}", "a {}", "{}"),
    *("a photo of a sks {}", "a sks {}"),
)
SEEDS = (0, 1, 2)


def main() -> None:
    """Print the table."""
    args = common.arguments(__doc__, repeats=1)
    zoo = load("lora-ws-mini")
    names = list(dict.fromkeys(zoo.column("subset").tolist()))[: 1 if args.quick else None]
    corners = [zoo.subset(name) for name in names]
    if args.quick:
        corners = [corner.select(range(0, len(corner), 10)) for corner in corners]
    columns = [measured(corner) for corner in corners]
    rows = [[fact, *(column[fact] for column in columns)] for fact in columns[0]]
    common.print_table(["%", *names], rows)
    common.facts("diffusers", adapters=len(zoo))


def measured(zoo: AdapterSet) -> dict[str, str]:
    """What is measured of one corner, in percent."""
    readers = [PromptReader(templates=(FRAME,), seed=seed) for seed in SEEDS]
    leak, *others = (prompt_leak(zoo, reader)[0] for reader in readers)
    labels, classes = zoo.labels()
    words = np.array(classes)
    own = words[labels]
    leaves = {part for leaf in zoo.column("category_name").tolist() for part in leaf.split("_")}
    every = np.array([*classes, *sorted(leaves - set(classes))])
    scores = readers[0].scores(zoo, every.tolist())
    readings = readers[0].read(zoo, classes)
    found = np.array([[reading.probabilities[word] for word in classes] for reading in readings])
    none = np.array([reading.none for reading in readings])
    named = np.where(none > found.max(axis=1), "", words[found.argmax(axis=1)])
    ten = softmax(scores[:, : len(classes)] / TEMPERATURE, axis=1)
    searched = [average_precision_score(own == word, found[:, k]) for k, word in enumerate(words)]
    frames = PromptReader(templates=FRAMES).likelihoods(zoo, classes).max(axis=2).argmax(axis=1)
    return {
        "top-1 of ten words": f"{100 * leak.top1:.1f}",
        "its 95 % interval": f"{100 * leak.low:.1f} to {100 * leak.high:.1f}",
        "with other noise": ", ".join(f"{100 * other.top1:.1f}" for other in others),
        "top-3 of ten words": f"{100 * leak.top3:.1f}",
        f"top-1 of {len(every)} words": f"{100 * (every[scores.argmax(axis=1)] == own).mean():.1f}",
        "the class word is named": f"{100 * (named == own).mean():.1f}",
        "another one is named": f"{100 * ((named != own) & (named != '')).mean():.1f}",
        "none of these": f"{100 * (named == '').mean():.1f}",
        "calibration error": f"{100 * expected_calibration_error(ten, labels).error:.1f}",
        "right one of nine frames": f"{100 * (frames == 0).mean():.1f}",
        "text search, mAP": f"{100 * np.mean(searched):.1f}",
    }


if __name__ == "__main__":
    main()
