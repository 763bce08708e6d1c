"""What tells folders of adapter files apart besides what the adapters draw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lora_ws.adapters import open_adapter
from lora_ws.learn.leaks import beats_guessing, largest_share, told_by_columns, told_by_group

# Endings of tensor names -> whose they are.
SPELLINGS = (
    *(
        (".lora_down.weight", "kohya"),
        (".lora_A.weight", "PEFT"),
        (".lora.down.weight", "diffusers"),
    ),
    *((".hada_w1_a", "LyCORIS"), (".lokr_w1", "LyCORIS"), (".lokr_w1_a", "LyCORIS")),
)


class Confound(NamedTuple):
    """A fact that tells folders apart.

    Attributes:
        what: the fact.
        share: of files whose folder it tells, on files that the guess was not fitted to.
        largest: of files in the largest folder.
    """

    what: str
    share: float
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.what} alone tells the folder of {100 * self.share:.0f} % of the files (the "
            f"largest folder has {100 * self.largest:.0f} %): the reader may go by it; train or "
            "collect the folders alike"
        )


def file_facts(file: Path) -> dict[str, float | str]:
    """What a header says of how a file was made, and nothing of what it draws.

    Raises:
        AdapterError: it cannot be read.

    Example:
        >>> from importlib.resources import files
        >>> file = Path(str(files("lora_ws") / "_assets/digit_testbed/seven.safetensors"))
        >>> facts = file_facts(file)
        >>> facts["rank"], facts["the trainer's way of naming"], facts["the number of modules"]
        (4.0, 'PEFT', 70.0)
    """
    with open_adapter(file) as opened:
        entries, header = opened.structure.entries, opened.header
        endings = (who for key in header.tensors for end, who in SPELLINGS if key.endswith(end))
        return {
            "the base model": opened.base.name,
            "rank": float(max(entry.form.factors_rank for entry in entries)),
            "the number of modules": float(len(entries)),
            "the file size": float(header.size),
            "the type of numbers": "/".join(sorted({i.dtype for i in header.tensors.values()})),
            "the trainer's way of naming": next(endings, "another"),
            "the header's metadata": " ".join(sorted(header.metadata)),
        }


def find_confounds(
    facts: Sequence[Mapping[str, float | str]],
    starts: Int[np.ndarray, " files"],
    labels: Int[np.ndarray, " files"],
    groups: Int[np.ndarray, " files"],
) -> list[Confound]:
    """Name the facts by which folders can be told apart better than by guessing.

    Each fact alone is tried by a decision tree on held-out folds of whole groups; the start (A
    before training) by the other files that share it. Binomial tests, one-sided, at
    0.01 over the number of facts.

    Args:
        facts: of each file, with the same keys.
        starts: number of each file's start.
        labels: of its folder.
        groups: of files that stay in one fold.

    Example:
        >>> labels = np.repeat([0, 1], 20)
        >>> facts = [{"rank": 4.0 * (1 + k), "dtype": "F16"} for k in labels]
        >>> [str(found)[:24] for found in find_confounds(facts, labels, labels, np.arange(40))]
        ['the start alone tells th', 'rank alone tells the fol']
    """
    tried = {"the start": told_by_group(starts, labels)}
    for name in facts[0]:
        codes = np.unique([one[name] for one in facts], return_inverse=True)[1]
        if codes.any():
            tried[name] = told_by_columns(codes[:, None], labels, groups), len(labels)
    return [
        Confound(name, hits / n, largest_share(labels))
        for name, (hits, n) in tried.items()
        if n and beats_guessing(hits, n, labels, len(tried))
    ]
