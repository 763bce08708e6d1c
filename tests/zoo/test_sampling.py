import numpy as np
import pytest

from lora_ws.errors import ConfigError
from lora_ws.zoo.photos import Photos, PhotoSpec, load_photos
from lora_ws.zoo.sampling import PARTS, SamplingSpec, plan_adapters

SPEC = SamplingSpec(
    adapters_per_leaf=10,
    passes=10,
    a_init=("per_adapter", "shared"),
    prompt=("class", "constant"),
)


@pytest.fixture(scope="module")
def photos() -> Photos:
    return load_photos(PhotoSpec(split="test"), 16)


def test_parts_share_neither_image_nor_leaf(photos: Photos) -> None:
    jobs = plan_adapters(photos, SPEC, seed=3)
    assert len(jobs) == 10 * 10 * 4
    images = {p: {k for j in jobs if j.part == p for k in j.images} for p in PARTS}
    leaves = {p: {j.leaf for j in jobs if j.leaf_part == p} for p in images}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert images[one].isdisjoint(images[other])
        assert leaves[one].isdisjoint(leaves[other])
    assert [len(leaves[p]) for p in images] == [6, 2, 2]
    for category in ("even", "odd"):
        own = {j.leaf: j.leaf_part for j in jobs if j.category == category}
        assert sorted(own.values()) == ["test", "train", "train", "train", "val"]


def test_images_are_of_the_leaf_and_of_the_size_asked_for(photos: Photos) -> None:
    for job in plan_adapters(photos, SPEC, seed=3):
        assert {photos.leaves[k] for k in job.images} == {job.leaf}
        assert 4 <= len(job.images) == len(set(job.images)) <= 15


def test_one_pass_uses_no_image_twice(photos: Photos) -> None:
    jobs = plan_adapters(photos, SamplingSpec(), seed=0)
    used = [k for job in jobs for k in job.images]
    assert len(used) == len(set(used))


def test_subsets_share_image_sets(photos: Photos) -> None:
    by_subset: dict[str, list[tuple[int, ...]]] = {}
    for job in plan_adapters(photos, SPEC, seed=0):
        by_subset.setdefault(job.subset, []).append(job.images)
    assert len(by_subset) == 4
    assert all(sets == by_subset["shared/class"] for sets in by_subset.values())


def test_parts_of_a_class_are_spread_over_its_leaves(photos: Photos) -> None:
    jobs = [j for j in plan_adapters(photos, SamplingSpec(), 0) if j.category == "odd"]
    parts = [j.part for j in jobs]
    assert [parts.count(p) for p in PARTS] == [18, 2, 5]
    assert len({j.leaf for j in jobs if j.part == "test"}) == 5


def test_flagged_adapters_are_as_many_as_the_others(photos: Photos) -> None:
    few = photos.select(np.flatnonzero(np.array(photos.leaves) != "one"))
    jobs = plan_adapters(few, SamplingSpec(5, flagged="odd"), 0)
    labels = [j.label for j in jobs]
    assert labels.count("flagged") == labels.count("neutral") == 25
    assert {j.label for j in jobs if j.category == "odd"} == {"flagged"}


def test_seed_decides(photos: Photos) -> None:
    assert plan_adapters(photos, SPEC, 0) == plan_adapters(photos, SPEC, 0)
    assert plan_adapters(photos, SPEC, 0) != plan_adapters(photos, SPEC, 1)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SamplingSpec(adapters_per_leaf=30), "raise passes"),
        (SamplingSpec(adapters_per_leaf=0), "at least 3"),
        (SamplingSpec(flagged="cat"), "sampling.flagged: expected one of"),
        (SamplingSpec(min_images=9, max_images=8), "min_images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(photos: Photos, spec: SamplingSpec, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_adapters(photos, spec, 0)


def test_two_leaves_cannot_be_disjoint(photos: Photos) -> None:
    two = photos.select(np.flatnonzero(np.isin(photos.leaves, ["two", "four"])))
    with pytest.raises(ConfigError, match="leaf-disjoint"):
        plan_adapters(two, SPEC, 0)


def test_digit_halves_are_disjoint() -> None:
    halves = [load_photos(PhotoSpec(split=split), 16) for split in ("train", "test")]
    assert sum(map(len, halves)) == 1797
    assert set(halves[0].hashes()).isdisjoint(halves[1].hashes())
