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


# Settings of training in headers that leave marks on the weights, or tell whose files they are.
CLAIMED = (
    *("ss_sd_model_name", "ss_base_model_version", "ss_network_module", "ss_network_alpha"),
    *("ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer", "ss_lr_scheduler"),
    *("ss_max_train_steps", "ss_num_epochs", "ss_num_train_images", "ss_total_batch_size"),
    *("ss_resolution", "ss_mixed_precision", "ss_seed", "ss_noise_offset", "ss_clip_skip"),
    *("ss_sd_scripts_commit_hash", "modelspec.architecture", "modelspec.author", "software"),
)


class Confound(NamedTuple):
    """A fact that tells folders apart.

    Attributes:
        what: the fact.
        share: of files whose folder it predicts, on files that the guess was not fitted to.
        largest: of files in the largest folder.
        files: how many it could be tried on.
    """

    what: str
    share: float
    largest: float
    files: int

    def __str__(self) -> str:
        return (
            f"{self.what} alone predicts the folder of {100 * self.share:.0f} % of {self.files} "
            f"files (the largest folder has {100 * self.largest:.0f} %): the reader may use it; "
            "train or collect the folders alike"
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
            **{f"`{name}` in the header": header.metadata.get(name, "") for name in CLAIMED},
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
        ['a start in common alone ', 'rank alone predicts the ']
    """
    # Of a start that only one file has, nothing can be said.
    tried = {"a start in common": told_by_group(starts, labels)}
    for name in facts[0]:
        codes = np.unique([one[name] for one in facts], return_inverse=True)[1]
        if codes.any():
            tried[name] = told_by_columns(codes[:, None], labels, groups), len(labels)
    return [
        Confound(name, hits / n, largest_share(labels), n)
        for name, (hits, n) in tried.items()
        if n and beats_guessing(hits, n, labels, len(tried))
    ]
