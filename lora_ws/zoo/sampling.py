"""Which images, prompt and seeds make which adapter: a pure function of photos and recipe.

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


@dataclass(frozen=True)
class SamplingSpec:
    """How image sets are drawn.

    Attributes:
        adapters_per_leaf: image sets of each leaf class.
        min_images: fewest images of an adapter.
        max_images: most images of an adapter.
        passes: how often the images of a leaf are dealt out anew when they run out; inside a pass
            no image is used twice.
        a_init: how A starts: each adapter its own draw, or all the same; several make subsets.
        prompt: "class" names the general class, "constant" does not; several make subsets.
    """

    adapters_per_leaf: int = 5
    min_images: int = 4
    max_images: int = 15
    passes: int = 1
    a_init: tuple[Init, ...] = ("per_adapter",)
    prompt: tuple[Prompt, ...] = ("class",)


@dataclass(frozen=True)
class Job:
    """One adapter to train.

    Attributes:
        number: position in the collection.
        image_set: number of its image set; the same in every subset.
        category: general class.
        leaf: leaf class.
        leaf_id: its number.
        images: positions of its images in the photos.
        text: the prompt.
        a_init: how A starts.
        prompt: kind of prompt.
        part: train, val or test, such that no image is behind two parts.
        leaf_part: train, val or test, such that no leaf class is in two parts.
    """

    number: int
    image_set: int
    category: str
    leaf: str
    leaf_id: int
    images: tuple[int, ...]
    text: str
    a_init: Init
    prompt: Prompt
    part: str
    leaf_part: str

    @property
    def subset(self) -> str:
        """Name of its subset."""
        return f"{self.a_init}/{self.prompt}"


def plan_jobs(photos: Photos, spec: SamplingSpec, seed: int) -> list[Job]:
    """List every adapter of a collection, subset after subset.

    Raises:
        ConfigError: a leaf has too few images, or a class too few leaves, for disjoint parts.

    Example:
        >>> from lora_ws.zoo.photos import PhotoSpec, load_photos
        >>> jobs = plan_jobs(load_photos(PhotoSpec(), 16), SamplingSpec(), seed=0)
        >>> len(jobs), jobs[0].text, jobs[0].subset
        (50, 'a photo of sks even', 'per_adapter/class')
    """
    if not 1 <= spec.min_images <= spec.max_images:
        raise ConfigError(
            f"expected 1 <= min_images <= max_images, got {spec.min_images} and {spec.max_images}"
        )
    sets = []
    rng = np.random.default_rng(seed)
    leaf_id = 0
    for category, leaves in photos.tree.items():
        leaf_parts = _leaf_parts(category, leaves, rng)
        for leaf in leaves:
            own = np.array(
                [
                    k
                    for k, name in enumerate(photos.leaves)
                    if name == leaf and photos.categories[k] == category
                ]
            )
            for part, images in _image_sets(leaf, own, spec, rng):
                sets.append((category, leaf, leaf_id, images, part, leaf_parts[leaf]))
            leaf_id += 1
    jobs = []
    for a_init, prompt in product(spec.a_init, spec.prompt):
        for k, (category, leaf, number, images, part, leaf_part) in enumerate(sets):
            text = f"a photo of sks {category}" if prompt == "class" else "a photo of sks"
            jobs.append(
                Job(
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


def _image_sets(
    leaf: str, own: np.ndarray, spec: SamplingSpec, rng: np.random.Generator
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Image sets of one leaf: 70, 10 and 20 % of them, and of the images, to each part."""
    n = spec.adapters_per_leaf
    val, test = max(1, round(0.1 * n)), max(1, round(0.2 * n))
    wanted = dict(zip(PARTS, (n - val - test, val, test), strict=True))
    if wanted["train"] < 1:
        raise ConfigError(f"adapters_per_leaf: expected at least 3 for three parts, got {n}")
    ends = np.round(np.cumsum([wanted[p] for p in PARTS]) / n * len(own)).astype(int)
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
