"""CLIPScore against transformers' own preprocessing and forward pass, on a random small CLIP."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cosine
from tolerances import rounding, terms_of
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_ws.composition.clip_score import ClipEncoder, clip_pixels, clip_score
from lora_ws.errors import DataError, NotAvailableError

SIDE = 32
LONGEST = 12
TEXTS = ["a cat", "a dog in a hat", "hat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights whose tokenizer knows letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    symbols = [*letters, *(f"{letter}</w>" for letter in letters)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={s: k for k, s in enumerate(symbols)}, merges=[])
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ends = {"bos_token_id": len(symbols) - 2, "eos_token_id": len(symbols) - 1}
    text = {**size, **ends, "num_attention_heads": 4, "vocab_size": len(symbols)}
    text |= {"max_position_embeddings": LONGEST, "pad_token_id": len(symbols) - 1}
    vision = {**size, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.parameters():  # as they start, all pictures are nearly the same
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClipEncoder:
    return ClipEncoder.load(str(folder))


def random_levels(height: int, width: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def as_pictures(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels).permute(0, 3, 1, 2) / 127.5 - 1


def processed(levels: np.ndarray, side: int) -> Tensor:
    """By transformers, from PIL pictures."""
    sizes: Any = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    images = [Image.fromarray(one) for one in levels]
    return CLIPImageProcessorPil(**sizes)(images=images, return_tensors="pt")["pixel_values"]


SHAPES = [(50, 71), (71, 50), (32, 32), (64, 64), (10, 23), (33, 90), (16, 16), (512, 512)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("side", [SIDE, 224])
def test_pixels_are_those_of_transformers(height: int, width: int, side: int) -> None:
    levels = random_levels(height, width, n=1)
    found, expected = clip_pixels(as_pictures(levels), side), processed(levels, side)
    # In levels of 255; rounding halves apart, all are the same.
    off = (found - expected).abs() * 0.27 * 255
    assert found.shape == expected.shape
    assert float(off.max()) < 2.5
    assert float((off > 0.1).double().mean()) < 0.01


def test_scores_are_cosines_of_transformers_embeddings(folder: Path, encoder: ClipEncoder) -> None:
    levels = random_levels(40, 56)
    model = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = model(**tokens, pixel_values=processed(levels, SIDE))
    seen, read = out.image_embeds.numpy(), out.text_embeds.numpy()
    expected = [100 * max(1 - cosine(i, t), 0) for i, t in zip(seen, read, strict=True)]
    found = clip_score(encoder, as_pictures(levels), TEXTS)
    assert found.shape == (3,)
    bound = rounding(terms_of(model), size=100)
    assert found.tolist() == pytest.approx(expected, abs=bound)
    flipped = clip_score(encoder, as_pictures(levels), TEXTS[::-1])
    assert flipped.tolist() != pytest.approx(expected, abs=bound)


def bound_of(encoder: ClipEncoder, embeddings: Tensor) -> float:
    model: Any = encoder.model
    return rounding(terms_of(model), size=float(embeddings.abs().max()))


def test_batches_change_nothing(encoder: ClipEncoder) -> None:
    pictures = as_pictures(random_levels(20, 30, n=5))
    texts = ["a", "a cat", "hat", "a dog in a", "b"]
    small = ClipEncoder(encoder.model, encoder.tokenizer, batch=2)
    for one, other in (
        (small.images(pictures), encoder.images(pictures)),
        (small.texts(texts), encoder.texts(texts)),
    ):
        assert torch.allclose(one, other, rtol=0, atol=bound_of(encoder, other))


def test_a_text_too_long_is_cut_and_said(encoder: ClipEncoder) -> None:
    text = "a b c d e f g h i j k l m"
    with pytest.warns(UserWarning, match=f"only the first {LONGEST} of 15 tokens count") as said:
        cut = encoder.texts([text])
    assert [Path(warning.filename).name for warning in said] == [Path(__file__).name]
    expected = encoder.texts([text[: 2 * (LONGEST - 2)]])
    assert torch.allclose(cut, expected, rtol=0, atol=bound_of(encoder, expected))


class Planted:
    """Embeddings that are given."""

    def __init__(self, seen: Tensor, read: Tensor) -> None:
        self.seen, self.read = seen, read

    def images(self, pictures: Tensor) -> Tensor:
        return self.seen

    def texts(self, texts: list[str]) -> Tensor:
        return self.read


def test_any_encoder_will_do() -> None:
    seen = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    read = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 1.0]])
    found = clip_score(Planted(seen, read), torch.zeros(4, 3, 2, 2), ["a", "b", "c", "d"])
    assert found.tolist() == pytest.approx([100, 0, 0, 100 / np.sqrt(2)])


@pytest.mark.parametrize(
    ("pictures", "texts", "expected"),
    [
        (torch.zeros(2, 3, 8, 8), ["a"], "texts: expected 2, one per image, got 1"),
        (torch.zeros(2, 3, 8, 8), "ab", "got a single one"),
        (torch.zeros(3, 8, 8), ["a"], r"pictures: expected .* got shape \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), ["a"], r"got shape \[1, 1, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), [], r"got shape \[0, 3, 8, 8\]"),
    ],
)
def test_bad_input_is_named(
    encoder: ClipEncoder, pictures: Tensor, texts: list[str], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        clip_score(encoder, pictures, texts)


@pytest.mark.parametrize("name", ["no/where", "openai/clip-vit-base-patch16", "not a name"])
def test_what_cannot_be_fetched_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotAvailableError, match=f"^{name}: no CLIP model here or on the Hub"):
        ClipEncoder.load(name)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="no CLIP model here"):
        ClipEncoder.load(str(tmp_path))


def test_half_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path)
    CLIPConfig.from_pretrained(folder).save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"it lacks \d+ of its tensors, such as"):
        ClipEncoder.load(str(tmp_path))


def test_a_model_without_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="expected a tokenizer, got none"):
        ClipEncoder.load(str(tmp_path))
