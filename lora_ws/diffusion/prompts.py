"""Prompts as a pipeline reads them: tokens, embeddings, and what would be cut off in silence."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.config import nearest
from lora_ws.diffusion.families import family_of
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.errors import ConfigError


def token_ids(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids ``[n, length]`` of prompts, padded."""
    return pipeline.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def check_prompts(pipeline: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts of which a text encoder would see only a part.

    Raises:
        ConfigError: a prompt is too long, or holds a word that a small base does not know.
    """
    tokenizer, most = family_of(pipeline).reads
    unknown = tokenizer.unk_token_id
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        if len(ids) > most:
            raise ConfigError(
                f"prompt: expected at most {most} tokens, its two ends counted, got {len(ids)} in "
                f"`{prompt}`; shorten it"
            )
        if unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id) and unknown in ids:
            word = next(w for w in prompt.split() if unknown in tokenizer(w).input_ids)
            known = sorted(w for w in tokenizer.get_vocab() if not w.startswith("<"))
            raise ConfigError(
                f"prompt: the {len(known)} words of the base hold no `{word}`{nearest(word, known)}"
            )


def check_single(pipeline: Any, generation: GenerationSpec) -> None:
    """Refuse what is not one image, or would be read in part.

    Raises:
        ConfigError: there are several prompts, or see `check_prompts`.
    """
    generation.prompts(1)
    check_prompts(pipeline, generation.texts)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Float[Tensor, "n length width"]:
    """Text embeddings as the U-Net of Stable Diffusion takes them."""
    ids = token_ids(pipeline, prompts).to(pipeline.text_encoder.device)
    return pipeline.text_encoder(input_ids=ids).last_hidden_state


@torch.no_grad()
def pooled_features(pipeline: Any, prompts: Sequence[str]) -> Float[Tensor, "n width"]:
    """One vector a prompt: what the text encoder makes of the token that ends it."""
    ids = token_ids(pipeline, prompts).to(pipeline.text_encoder.device)
    return pipeline.text_encoder(input_ids=ids).pooler_output
