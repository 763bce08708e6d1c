"""Grids of images as PNG."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LABEL_WIDTH, TEXT_SIZE = 220, 14


def to_png(image: Tensor, texts: Mapping[str, str] | None = None) -> bytes:
    """Encode an image ``[3, height, width]`` from -1 to 1 as PNG, a pixel a pixel.

    Args:
        image: to encode.
        texts: what the file says of itself, by keyword.
    """
    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    written = BytesIO()
    Image.fromarray(pixels).save(written, "PNG", pnginfo=_chunks(texts))
    return written.getvalue()


def _chunks(texts: Mapping[str, str] | None) -> Any:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_text(name, text)
    return chunks


def save_grid(
    images: Sequence[Tensor] | Tensor,
    columns: int,
    file: Path,
    scale: int = 2,
    labels: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write images ``[3, height, width]`` from -1 to 1 as one PNG, row by row.

    Args:
        images: all of one size.
        columns: images per row.
        file: where to write.
        scale: each pixel becomes ``scale`` by ``scale``.
        labels: what stands before each row; none leaves no room for them.
        texts: what the file says of itself, by keyword.
    """
    from PIL import Image

    tiles = list(images)
    blank = torch.ones_like(tiles[0])
    tiles += [blank] * (-len(tiles) % columns)
    rows = [torch.cat(tiles[k : k + columns], dim=2) for k in range(0, len(tiles), columns)]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
    )
    if labels:
        picture = _labelled(picture, labels)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, pnginfo=_chunks(texts))
    return file


def _labelled(picture: Any, labels: Sequence[str]) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    whole = Image.new("RGB", (picture.width + LABEL_WIDTH, picture.height), "white")
    whole.paste(picture, (LABEL_WIDTH, 0))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(TEXT_SIZE)
    height = picture.height / len(labels)
    for k, label in enumerate(labels):
        while draw.textlength(label, font) > LABEL_WIDTH - 16:
            label = f"{label.rstrip('…')[:-1]}…"
        draw.text((8, (k + 0.5) * height), label, "#1d2430", font, anchor="lm")
    return whole
