"""Images, prompt and seeds of every adapter: a pure function of photos and recipe.

The paper draws 4 to 15 images of one leaf class for each adapter, without replacement. Parts of the
collection are decided before: images of each leaf are dealt to train, validation and test, and an
image set is drawn inside one part, so that no image is behind adapters of two parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from lora_ws.diffusion.bank import Init
from lora_ws.errors import ConfigError
from lora_ws.zoo.photos import Photos

Prompt = Literal["class", "constant"]
PARTS = ("train", "val", "test")
LABELS = ("neutral", "flagged")


@dataclass(frozen=True)
class SamplingSpec:
    """How image sets are drawn.

    Attributes:
        adapters_per_leaf: image sets per leaf class.
        min_images: minimal number of images per adapter.
        max_images: maximal number of images per adapter.
        passes: number of times that the images of a leaf class are used; each image once per pass.
        a_init: initialisation of A: one draw per adapter, or one for all; several values make
            subsets.
        prompt: "class" contains the general class, "constant" does not; several values make
            subsets.
        template: the constant prompt; the general class follows it where the prompt contains it.
        flagged: general class that stands for flagged content, if any: the column `label` is then
            flagged or neutral, and its leaves get as many adapters as all others together.
    """

    adapters_per_leaf: int = 5
    min_images: int = 4
    max_images: int = 15
    passes: int = 1
    a_init: tuple[Init, ...] = ("per_adapter",)
    prompt: tuple[Prompt, ...] = ("class",)
    template: str = "a photo of sks"
    flagged: str | None = None


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter to train.

    Attributes:
        number: position in the collection.
        image_set: number of its image set; the same in every subset.
        category: general class.
        leaf: leaf class.
        leaf_number: its number.
        images: positions of its images in the photos.
        text: the prompt.
        a_init: how A starts.
        prompt: kind of prompt.
        part: train, val or test, such that no image is behind two parts.
        leaf_part: train, val or test, such that no leaf class is in two parts.
        label: flagged or neutral, or the general class where none is flagged.
    """

    number: int
    image_set: int
    category: str
    leaf: str
    leaf_number: int
    images: tuple[int, ...]
    text: str
    a_init: Init
    prompt: Prompt
    part: str
    leaf_part: str
    label: str

    @property
    def subset(self) -> str:
        """Name of its subset."""
        return f"{self.a_init}/{self.prompt}"


def plan_adapters(photos: Photos, spec: SamplingSpec, seed: int) -> list[AdapterPlan]:
    """List every adapter of a collection, subset after subset.

    Raises:
        ConfigError: a leaf has too few images, or a class too few leaves, for disjoint parts.

    Example:
        >>> from lora_ws.zoo.photos import PhotoSpec, load_photos
        >>> jobs = plan_adapters(load_photos(PhotoSpec(), 16), SamplingSpec(), seed=0)
        >>> len(jobs), jobs[0].text, jobs[0].subset
        (50, 'a photo of sks even', 'per_adapter/class')
    """
    if not 1 <= spec.min_images <= spec.max_images:
        raise ConfigError(
            f"expected 1 <= min_images <= max_images, got {spec.min_images} and {spec.max_images}"
        )
    sets = []
    rng = np.random.default_rng(seed)
    leaf_number = 0
    tree = photos.tree
    counts = _adapters_per_class(tree, spec)
    leaf_of, category_of = np.array(photos.leaves), np.array(photos.categories)
    for category, leaves in tree.items():
        leaf_parts = _leaf_parts(category, leaves, rng)
        parts = np.array_split(_parts(category, counts[category]), len(leaves))
        for leaf, wanted in zip(leaves, parts, strict=True):
            own = np.flatnonzero((leaf_of == leaf) & (category_of == category))
            for part, images in _image_sets(leaf, own, wanted, spec, rng):
                sets.append((category, leaf, leaf_number, images, part, leaf_parts[leaf]))
            leaf_number += 1
    jobs = []
    for a_init, prompt in product(spec.a_init, spec.prompt):
        for k, (category, leaf, number, images, part, leaf_part) in enumerate(sets):
            text = f"{spec.template} {category}" if prompt == "class" else spec.template
            jobs.append(
                AdapterPlan(
                    len(jobs),
                    k,
                    category,
                    leaf,
                    number,
                    images,
                    text,
                    a_init,
                    prompt,
                    part,
                    leaf_part,
                    category if spec.flagged is None else LABELS[category == spec.flagged],
                )
            )
    return jobs


def _leaf_parts(category: str, leaves: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
    """One leaf in five for validation and one for test, at least one each."""
    if len(leaves) < 3:
        raise ConfigError(
            f"class `{category}` has {len(leaves)} leaf classes; leaf-disjoint parts need 3"
        )
    held = max(1, len(leaves) // 5)
    order = [leaves[k] for k in rng.permutation(len(leaves))]
    parts = ["val"] * held + ["test"] * held + ["train"] * (len(leaves) - 2 * held)
    return dict(zip(order, parts, strict=True))


def _adapters_per_class(tree: dict[str, tuple[str, ...]], spec: SamplingSpec) -> dict[str, int]:
    counts = {name: spec.adapters_per_leaf * len(leaves) for name, leaves in tree.items()}
    if spec.flagged is not None:
        if spec.flagged not in tree or len(tree) < 2:
            raise ConfigError(
                f"sampling.flagged: expected one of several classes ({', '.join(tree)}), got "
                f"`{spec.flagged}`"
            )
        counts[spec.flagged] = sum(counts.values()) - counts[spec.flagged]
    return counts


def _parts(category: str, count: int) -> np.ndarray:
    """Part of each image set of a class, 70, 10 and 20 % of them, spread evenly over its leaves."""
    val, test = max(1, round(0.1 * count)), max(1, round(0.2 * count))
    if count < val + test + 1:
        raise ConfigError(
            f"class `{category}`: expected at least 3 adapters for three parts, got {count}; "
            "raise adapters_per_leaf"
        )
    parts = np.full(count, "train", dtype="<U5")
    parts[_spread(test, count)] = "test"
    left = np.flatnonzero(parts == "train")
    parts[left[_spread(val, len(left))]] = "val"
    return parts


def _spread(count: int, length: int) -> np.ndarray:
    """``count`` positions at equal distances."""
    return ((np.arange(count) + 0.5) * length / count).astype(int)


def _image_sets(
    leaf: str, own: np.ndarray, parts: np.ndarray, spec: SamplingSpec, rng: np.random.Generator
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Image sets of one leaf; each part has images of its own, in proportion to its sets."""
    wanted = {part: int((parts == part).sum()) for part in PARTS}
    ends = np.round(np.cumsum(list(wanted.values())) / len(parts) * len(own)).astype(int)
    pools = np.split(rng.permutation(own), ends[:-1])
    for part, pool in zip(PARTS, pools, strict=True):
        found = list(_deal(pool, spec, wanted[part], rng))
        if len(found) < wanted[part]:
            raise ConfigError(
                f"leaf `{leaf}`: its {len(pool)} images for {part} give {len(found)} sets of "
                f"{spec.min_images} to {spec.max_images} in {spec.passes} passes, "
                f"{wanted[part]} are needed; raise passes, or lower adapters_per_leaf"
            )
        yield from ((part, images) for images in found)


def _deal(
    pool: np.ndarray, spec: SamplingSpec, wanted: int, rng: np.random.Generator
) -> Iterator[tuple[int, ...]]:
    for _ in range(spec.passes):
        left = rng.permutation(pool)
        while len(left) >= spec.min_images and wanted:
            size = int(rng.integers(spec.min_images, min(spec.max_images, len(left)) + 1))
            yield tuple(int(k) for k in np.sort(left[:size]))
            left, wanted = left[size:], wanted - 1
