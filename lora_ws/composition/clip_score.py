"""CLIPScore: how near an image is to a text, as CLIP sees both (Hessel et al. 2021).

``100 max(cos, 0)``, the form in which work on composing adapters reports it, where the text is all
trigger phrases. It says hardly anything of how well people think adapters are composed
(correlations of -0.01 and 0.08 in Zhong et al. 2024), so it belongs beside a judge, not in its
place.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lora_ws.errors import DataError, NotAvailableError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Encoder(Protocol):
    """Anything that embeds images and texts in one space."""

    def images(self, pictures: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n d"]:
        """Embed images from -1 to 1."""
        ...

    def texts(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Embed texts."""
        ...


def clip_score(
    encoder: Encoder, pictures: Float[Tensor, "n 3 height width"], texts: Sequence[str]
) -> Float[Tensor, " n"]:
    """Score images by their texts.

    Args:
        encoder: of both.
        pictures: from -1 to 1.
        texts: one per image, such as its trigger phrases joined by commas.

    Returns:
        From 0 to 100; around 35 where CLIP ViT-B/16 finds what the text says.

    Raises:
        DataError: there is not one text per image.
    """
    _check(pictures)
    if isinstance(texts, str) or len(texts) != len(pictures):
        got = "a single one" if isinstance(texts, str) else str(len(texts))
        raise DataError(f"texts: expected {len(pictures)}, one per image, got {got}")
    seen = encoder.images(pictures).float()
    read = encoder.texts(list(texts)).float().to(seen.device)
    return 100 * functional.cosine_similarity(seen, read).clamp(min=0)


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """A CLIP model of both images and texts.

    Attributes:
        model: a transformers ``CLIPModel``.
        tokenizer: its tokenizer.
        batch: images or texts at once.
    """

    model: Any
    tokenizer: Any
    batch: int = 64

    @classmethod
    def load(
        cls, name: str = "openai/clip-vit-base-patch16", device: str = "cpu", batch: int = 64
    ) -> "ClipEncoder":
        """Load a model for inference, float32.

        Args:
            name: a repository on the Hub, or a folder.
            device: where to put it.
            batch: images or texts at once.

        Raises:
            NotAvailableError: it is neither here nor reachable.
            DataError: it is no CLIP model of images and texts.
        """
        from transformers import AutoTokenizer, CLIPModel

        try:
            with _quiet():
                loaded: Any = CLIPModel.from_pretrained(name, output_loading_info=True)
                tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotAvailableError(
                f"{name}: no CLIP model here or on the Hub ({first}); expected a folder with "
                "config.json, or owner/name"
            ) from error
        model, found = loaded
        # What a file lacks would be random numbers, and so would the scores.
        if missing := sorted(found["missing_keys"]):
            raise DataError(
                f"{name}: expected a CLIP model of images and texts, it lacks {len(missing)} of "
                f"its tensors, such as `{missing[0]}`"
            )
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise DataError(f"{name}: expected a tokenizer, got none; add its tokenizer.json")
        return cls(model.requires_grad_(False).eval().to(device).float(), tokenizer, batch)

    @torch.inference_mode()
    def images(self, pictures: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n d"]:
        """Embed images from -1 to 1, of any size.

        Raises:
            DataError: they are none.
        """
        _check(pictures)
        size = int(self.model.config.vision_config.image_size)
        parts = [
            self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
            for some in pictures.split(self.batch)
            for pixels in [clip_pixels(some.to(self.model.device), size)]
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Embed texts. Longer ones than the model takes are cut, with a warning."""
        most = int(self.model.config.text_config.max_position_embeddings)
        parts = []
        for start in range(0, len(texts), self.batch):
            some = texts[start : start + self.batch]
            longest = max(len(ids) for ids in self.tokenizer(some, verbose=False).input_ids)
            if longest > most:
                warnings.warn(
                    f"texts: only the first {most} of {longest} tokens count, as far as CLIP reads",
                    stacklevel=3,
                )
            tokens = self.tokenizer(
                some, padding=True, truncation=True, max_length=most, return_tensors="pt"
            ).to(self.model.device)
            read = self.model.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            parts.append(self.model.text_projection(read.pooler_output))
        return torch.cat(parts)


def clip_pixels(
    pictures: Float[Tensor, "n 3 height width"], size: int
) -> Float[Tensor, "n 3 size size"]:
    """Images from -1 to 1 as CLIP takes them: the middle square, in its numbers.

    As its own preprocessing does: the shorter side is resized to ``size`` by cubics with
    antialiasing, width before height and on whole numbers from 0 to 255 throughout, and the middle
    of the longer one is kept.
    """
    levels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round()
    height, width = levels.shape[-2:]
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    for shape in ((height, wide), (tall, wide)):
        if shape != levels.shape[-2:]:
            levels = functional.interpolate(levels, shape, mode="bicubic", antialias=True)
            levels = (levels + 0.5).floor().clamp(0, 255)
    top, left = (tall - size) // 2, (wide - size) // 2
    middle = levels[..., top : top + size, left : left + size] / 255
    mean, std = (middle.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (middle - mean) / std


def _check(pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise DataError(
            f"pictures: expected [n, 3, height, width], got shape {list(pictures.shape)}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loader's bars and its report of what it did not find off the screen."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
