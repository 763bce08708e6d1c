"""Adapters found by a text with a trained zero-shot bundle."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from lora_ws.adapters import AdapterRef
from lora_ws.audit.classify import classify_files
from lora_ws.audit.prompt import subject
from lora_ws.audit.prompt_search import BATCH, OnError
from lora_ws.bundle import Bundle
from lora_ws.config import nearest
from lora_ws.errors import ConfigError, DataError
from lora_ws.models.text_head import TextHead, TextHeadModule


class TextHit(NamedTuple):
    """An adapter file, and how probable a text is among the names that a bundle knows.

    Attributes:
        file: what the user calls it.
        probability: of the text, the names of the bundle beside it.
        reason: why the bundle would abstain, a key of `ABSTENTIONS`; empty where it would not.
    """

    file: str
    probability: float
    reason: str


def ask_bundle(bundle: Bundle, text: str, device: str = "cpu") -> tuple[Bundle, str]:
    """Put a text among the names that a zero-shot bundle chooses from.

    Args:
        bundle: trained by ``task=zero_shot``.
        text: what is looked for; a frame such as "a photo of a" is replaced by the bundle's own.
        device: that the text encoder runs on.

    Returns:
        The bundle, asked; what it calls the text.

    Raises:
        ConfigError: it was not trained so, or on features of a file, which have no others.
    """
    model, network = bundle.model, bundle.network
    if not isinstance(model, TextHead) or not isinstance(network, TextHeadModule):
        raise ConfigError(
            f"model: expected a bundle trained by task=zero_shot, got one of "
            f"{type(model).__name__}, which knows no texts; leave it out to search by prompts"
        )
    words = subject(text)
    names = {name.replace("_", " "): name for name in bundle.classes}
    if words.replace("_", " ") in names:
        return bundle, names[words.replace("_", " ")]
    if not model.encoder:
        raise ConfigError(
            f"text: the bundle was trained on features of a file, which has none of `{words}`"
            f"{nearest(words, bundle.classes)}"
        )
    from lora_ws.diffusion.text_features import encode_names

    found = torch.from_numpy(encode_names(model.encoder, model.prompt, [words], device))
    if found.shape[1] != model.width:
        raise ConfigError(
            f"text: expected {model.width} features, as the bundle was trained on, got "
            f"{found.shape[1]} from {model.encoder}; it is another base of that name"
        )
    texts = np.concatenate([network.directions(found).numpy(), bundle.tensors["texts"]])
    tensors = {**bundle.tensors, "texts": texts}
    return replace(bundle, classes=(words, *bundle.classes), tensors=tensors), words


def search_bundle(
    bundle: Bundle, refs: Sequence[AdapterRef], text: str, on_error: OnError, device: str = "cpu"
) -> list[TextHit]:
    """Rank files by the probability of a text, what they were trained on being one of the names.

    Args:
        bundle: trained by ``task=zero_shot``.
        refs: the files.
        text: what is looked for.
        on_error: called for files that cannot be judged.
        device: that the text encoder runs on.

    Returns:
        The most probable first.
    """
    asked, name = ask_bundle(bundle, text, device)
    hits = []
    for start in range(0, len(refs), BATCH):
        for ref, result in zip(
            refs[start : start + BATCH],
            classify_files(refs[start : start + BATCH], asked, whole=False),
            strict=True,
        ):
            finding = result.finding
            assert finding is not None  # nothing is known already
            if finding.verdict is None:
                why = finding.message or f"{ref.name}: {finding.no_prediction_reason}"
                on_error(ref.name, DataError(why))
                continue
            shares = finding.verdict.probabilities
            hits.append(TextHit(ref.name, shares[name], finding.verdict.reason))
    return sorted(hits, key=lambda hit: -hit.probability)
