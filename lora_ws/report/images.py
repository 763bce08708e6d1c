"""Grids of images as PNG."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def save_grid(images: Sequence[Tensor] | Tensor, columns: int, file: Path, scale: int = 2) -> Path:
    """Write images ``[3, height, width]`` from -1 to 1 as one PNG, row by row.

    Args:
        images: all of one size.
        columns: images a row.
        file: where to write.
        scale: each pixel becomes ``scale`` by ``scale``.
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
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
    return file
