"""Photos with a general class and a leaf class each, from scikit-learn, parquet or the Hub."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lora_ws.diffusion.digits import NAMES, digit_pictures
from lora_ws.errors import ConfigError, DataError, NotAvailableError

DIGITS = "digits"
# Columns of the image set that the paper's authors published.
PUBLISHED = ("image", "category_label", "category_name")


@dataclass(frozen=True)
class PhotoSpec:
    """Where photos come from.

    Attributes:
        source: "digits" (scikit-learn's, nothing to fetch), a repository of images on the Hub, a
            folder with a file ``<split>.parquet``, or one parquet file.
        split: split to use; for digits, "train" is the first half of each digit's images and "test"
            the second.
        image: column of the image; ignored for files with the published columns (image,
            category_label, category_name).
        category: column of the general class.
        leaf: column of the leaf class.
        words: general class in the source -> word in prompts; other classes are excluded. Empty
            takes all classes as they are.
    """

    source: str = DIGITS
    split: str = "train"
    image: str = "image"
    category: str = "category_label"
    leaf: str = "category_name"
    words: dict[str, str] = field(default_factory=dict)

    @property
    def public(self) -> "PhotoSpec":
        """The same with the last part of a path alone, as records that are handed on show it."""
        is_local = self.source.endswith(".parquet") or Path(self.source).is_dir()
        return replace(self, source=Path(self.source).name) if is_local else self

    @property
    def file(self) -> Path | None:
        """The parquet file, where the source is local."""
        if Path(self.source).is_dir():
            return Path(self.source) / f"{self.split}.parquet"
        return Path(self.source) if self.source.endswith(".parquet") else None


@dataclass(frozen=True, eq=False)
class Photos:
    """Images in memory with their classes.

    Attributes:
        pixels: ``[n, height, width, 3]``.
        categories: general class of each, as prompts name it.
        leaves: leaf class of each.
    """

    pixels: UInt8[np.ndarray, "n height width 3"]
    categories: tuple[str, ...]
    leaves: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def words(self) -> tuple[str, ...]:
        """Every class name."""
        return tuple(sorted({*self.categories, *self.leaves}))

    @property
    def tree(self) -> dict[str, tuple[str, ...]]:
        """General class -> its leaf classes, both sorted."""
        pairs = sorted(set(zip(self.categories, self.leaves, strict=True)))
        return {c: tuple(leaf for k, leaf in pairs if k == c) for c, _ in pairs}

    def hashes(self) -> list[str]:
        """Content hash of each image, 16 hexadecimal digits."""
        return [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in self.pixels]

    def select(self, index: np.ndarray) -> "Photos":
        """Keep the images at ``index``."""
        pick = np.asarray(index, int)
        return Photos(
            self.pixels[pick],
            tuple(self.categories[k] for k in pick),
            tuple(self.leaves[k] for k in pick),
        )

    def tensor(self, index: Any = slice(None)) -> Float[Tensor, "n 3 height width"]:
        """Images from -1 to 1, channels first."""
        chosen = torch.from_numpy(np.ascontiguousarray(self.pixels[index]))
        return chosen.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_photos(spec: PhotoSpec, size: int) -> Photos:
    """Read photos, scaled and cropped to ``size`` pixels per side.

    Raises:
        NotAvailableError: the source is not here and cannot be reached.
        DataError: a column or class is missing.

    Example:
        >>> load_photos(PhotoSpec(), 16).tree["even"]
        ('eight', 'four', 'six', 'two', 'zero')
    """
    if spec.source == DIGITS:
        return _digits(spec.split, size)
    from datasets import Image as ImageFeature

    table = _open(spec)
    image, category, leaf = _columns(table.column_names, spec)
    # A file without the Hub's feature description holds plain bytes.
    table = table.cast_column(image, ImageFeature())
    named = {name: _names(table, name) for name in (category, leaf)}
    categories = named[category]
    words = spec.words or {name: name for name in categories}
    if not set(words) <= set(categories) and set(words.values()) <= set(categories):
        # The file has the prompt words already.
        words = {word: word for word in words.values()}
    if unknown := sorted(set(words) - set(categories)):
        raise DataError(
            f"words: {spec.source} has no class `{unknown[0]}` in column `{category}`; it has "
            f"{', '.join(sorted(set(categories)))}"
        )
    keep = np.array([k for k, name in enumerate(categories) if name in words])
    pixels = np.stack([_square(table[int(k)][image], size) for k in keep])
    return Photos(
        pixels,
        tuple(words[categories[k]] for k in keep),
        tuple(named[leaf][k].replace("_", " ") for k in keep),
    )


def _digits(split: str, size: int) -> Photos:
    """Handwritten digits: even and odd are the general classes, each of five leaves."""
    if split not in ("train", "test"):
        raise ConfigError(f"split: digits have `train` and `test`, got `{split}`")
    pictures, target = digit_pictures(size)
    keep = []
    for digit in range(10):
        own = np.flatnonzero(target == digit)
        half = len(own) // 2
        keep.append(own[:half] if split == "train" else own[half:])
    index = np.sort(np.concatenate(keep))
    scaled = (pictures[torch.from_numpy(index)] + 1) / 2
    pixels = (scaled * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    leaves = tuple(NAMES[k] for k in target[index])
    return Photos(pixels, tuple(("even", "odd")[k % 2] for k in target[index]), leaves)


def _open(spec: PhotoSpec) -> Any:
    from datasets import load_dataset

    if spec.file is not None:
        if not spec.file.is_file():
            raise NotAvailableError(f"source: no file {spec.file}")
        return load_dataset("parquet", data_files=str(spec.file), split="train")
    try:
        return load_dataset(spec.source, split=spec.split)
    except Exception as error:  # the many kinds of failure of a download
        raise NotAvailableError(
            f"source: cannot read {spec.source} from the Hub ({error}); name a local folder with "
            f"{spec.split}.parquet"
        ) from error


def _columns(present: list[str], spec: PhotoSpec) -> tuple[str, str, str]:
    for wanted in ((spec.image, spec.category, spec.leaf), PUBLISHED):
        if set(wanted) <= set(present):
            return wanted
    raise DataError(
        f"{spec.source}: expected columns {spec.image}, {spec.category} and {spec.leaf} (or "
        f"{', '.join(PUBLISHED)}), got {', '.join(present)}"
    )


def _names(table: Any, column: str) -> list[str]:
    """Values of a class column, spelt out."""
    feature = table.features[column]
    values = table[column]
    return [feature.int2str(v) if hasattr(feature, "int2str") else str(v) for v in values]


def _square(image: Any, size: int) -> np.ndarray:
    """The middle square of an image, scaled."""
    from PIL import ImageOps

    if image.size == (size, size):
        return np.asarray(image.convert("RGB"))
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
