"""Planted leaks are named, each by its kind, and a clean collection passes."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.collection import AdapterSet, DatasetCard, SplitRule
from lora_ws.learn.leaks import Finding, find_leaks

N, CLASSES = 60, 3


def zoo(rank: int = 1, **columns: list) -> AdapterSet:
    """Random updates of three classes; rows k, k + 3, … are of one class."""
    layout = Layout(tuple(LayerSpec(f"m{k}", 24, 16, rank) for k in range(4)))
    rng = np.random.default_rng(0)
    labels = [f"c{k % CLASSES}" for k in range(N)]
    parts = ["test" if k % 5 == 4 else "val" if k % 5 == 3 else "train" for k in range(N)]
    card = DatasetCard(
        name="own",
        label="kind",
        split=SplitRule(column="part"),
        group_columns={"photos": "photos", "leaf": "leaf"},
    )
    rows = {
        "kind": labels,
        "part": parts,
        "photos": [[2 * k, 2 * k + 1] for k in range(N)],
        "leaf": [f"leaf {k}" for k in range(N)],
        "prompt": ["a photo of sks"] * N,
        "num_images": rng.integers(4, 16, N).tolist(),
        "learning_rate": [1e-4] * N,
        **columns,
    }
    weights = rng.standard_normal((N, layout.size), dtype=np.float32)
    return AdapterSet(weights, layout, pa.table(rows), card)


def found(adapters: AdapterSet) -> dict[str, Finding]:
    return {one.what: one for one in find_leaks(adapters)}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_clean_collection_passes(rank: int):
    assert {one.verdict for one in find_leaks(zoo(rank))} == {"clean"}


def test_photos_of_test_rows_that_training_rows_saw_are_a_leak():
    # Row 4 is a test row, row 0 one to train on.
    photos = [[2 * k, 2 * k + 1] for k in range(N)]
    photos[4] = [0, 9]
    one = found(zoo(photos=photos))["photos"]
    assert one.verdict == "leak"
    assert one.found.startswith(f"{100 / (N / 5):.0f} % of test rows share")
    assert one.advice == "--split group:photos"


def test_a_shared_leaf_class_is_a_note():
    assert found(zoo(leaf=["one", "two"] * (N // 2)))["leaf"].verdict == "note"


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("starts", [1, 4])
def test_starts_are_found_in_the_weights(rank: int, starts: int):
    adapters = zoo(rank)
    weights = adapters.weights.copy()
    for _, down, _ in adapters.layout.pairs():
        weights[:, down] = weights[np.arange(N) % starts, down] * 1.01
    one = found(replace(adapters, weights=weights))["start"]
    assert one.verdict == ("note" if starts == 1 else "leak")
    assert "predicts the label" not in one.found


def test_a_start_for_each_class_tells_the_label():
    adapters = zoo()
    weights = adapters.weights.copy()
    for _, down, _ in adapters.layout.pairs():
        weights[:, down] = weights[np.arange(N) % CLASSES, down]
    one = found(replace(adapters, weights=weights))["start"]
    assert one.verdict == "leak"
    assert "predicts the label of 100 %" in one.found


def test_near_copies_across_parts_are_a_leak():
    adapters = zoo()
    weights = adapters.weights.copy()
    weights[4] = 1.001 * weights[0]
    assert found(replace(adapters, weights=weights))["copies"].verdict == "leak"


@pytest.mark.parametrize("values", [[1e-4, 3e-4, 1e-3], ["adamw", "lion", "prodigy"]])
def test_a_recipe_for_each_class_is_a_leak(values: list):
    name = "optimizer" if isinstance(values[0], str) else "learning_rate"
    one = found(zoo(**{name: [values[k % CLASSES] for k in range(N)]}))["recipe"]
    assert one.verdict == "leak"
    assert name in one.found


def test_prompts_that_name_the_class_are_a_leak():
    prompts = [f"a photo of sks c{k % CLASSES}" for k in range(N)]
    assert found(zoo(prompt=prompts))["prompts"].verdict == "leak"
    # Part of a longer word is not the word.
    assert found(zoo(prompt=[text + "at" for text in prompts]))["prompts"].verdict == "clean"
