"""`lora-ws reproduce transfer`: zoos side by side, what is taught, and what is lost, by hand."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browser import open_page
from scipy.stats import bootstrap

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, load
from lora_ws.collection.card import DatasetCard
from lora_ws.config import load_spec
from lora_ws.errors import ConfigError, DataError
from lora_ws.experiments.differences import interval
from lora_ws.experiments.kinds import eval_file
from lora_ws.experiments.options import Options, ReproduceSpec
from lora_ws.experiments.recipes import recipe
from lora_ws.experiments.transfer.matrix import matrices
from lora_ws.experiments.transfer.run import readable, run
from lora_ws.experiments.transfer.spec import (
    RECIPE,
    TransferReaderSpec,
    TransferRecord,
    TransferSpec,
    ValueSpec,
    same_recipe,
)
from lora_ws.experiments.transfer.zoos import Zoos, align
from lora_ws.zoo.finetune import FinetuneSpec
from lora_ws.zoo.spec import ZooSpec

SETS = 40
FACTORS = {
    "rank": {"1": ValueSpec(), "2": ValueSpec({"finetune.rank": 2})},
    "steps": {
        name: ValueSpec({"finetune.steps": int(name)} if name != "2" else {}) for name in "123"
    },
}


def spec() -> TransferSpec:
    return TransferSpec(
        kind="transfer", title="t", source="s", zoo="zoo/transfer", factors=FACTORS, readers=()
    )


def zoo(rank: int, order: np.ndarray, seed: int) -> AdapterSet:
    """Random adapters, the set of photos of row k being (2 k', 2 k' + 1), k' = order[k]."""
    layout = Layout.known("tiny_sd_qv").at_rank(rank)
    rows = np.random.default_rng(seed).normal(size=(len(order), layout.size)).astype(np.float32)
    images = [[str(2 * k), str(2 * k + 1)] for k in order.tolist()]
    table = pa.table({"images": images, "label": ["ab"[k % 2] for k in order.tolist()]})
    return AdapterSet(rows, layout, table, DatasetCard(name="x", label="label"))


@pytest.fixture(scope="module")
def zoos() -> Zoos:
    rng = np.random.default_rng(0)
    one, two, three = (np.append(rng.permutation(SETS), extra) for extra in (90, 91, 92))
    return align({"one": zoo(1, one, 1), "two": zoo(2, two, 2), "three": zoo(1, three, 3)})


def test_each_zoo_each_mixture_and_all_but_one_is_trained_on_once():
    one, trained = spec(), set(spec().trainings)
    assert len(one.trainings) == len(trained)
    steps = one.zoos("steps")
    assert steps == ("steps=1", RECIPE, "steps=3")
    expected = {(name,) for name in (*steps, "rank=2")} | {steps, one.zoos("rank")}
    expected |= {steps[1:], (steps[0], steps[2]), steps[:2]}
    assert trained == expected
    assert one.tested((RECIPE,)) == (RECIPE, "rank=2", "steps=1", "steps=3")
    assert one.tested(("rank=2",)) == one.zoos("rank")
    assert one.tested(("steps=1", "steps=3")) == steps


def test_a_factor_has_a_value_without_changes_and_a_cast_no_others():
    with pytest.raises(ConfigError, match=r"factors.rank: expected two values or more, one of"):
        replace(spec(), factors={"rank": {"1": ValueSpec()}})
    with pytest.raises(ConfigError, match="changes: expected no cast beside it"):
        ValueSpec({"finetune.rank": 2}, "int8")
    both = {"rank": {"1": ValueSpec(), "2": ValueSpec(dataset="lora-ws-mini")}}
    with pytest.raises(ConfigError, match=r"factors.rank: expected .*, got"):
        replace(spec(), factors=both)


def test_zoos_are_brought_side_by_side(zoos: Zoos):
    seen = [[tuple(i) for i in own.column("images").tolist()] for own in zoos.zoos.values()]
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) == SETS
    assert [int(a) // 2 % 2 for a, _ in seen[0]] == zoos.labels.tolist()


def test_zoos_of_other_photos_are_refused():
    order = np.arange(4)
    with pytest.raises(DataError, match="expected photo sets that all were trained on, found none"):
        align({"one": zoo(1, order, 0), "two": zoo(1, order + 50, 0)})


def test_subsets_of_a_collection_are_a_factor_with_the_collections_parts():
    names = ("per_adapter/class", "shared/class")
    values = {name: ValueSpec(dataset="lora-ws-mini", subset=name) for name in names}
    one = replace(spec(), factors={"start": values})
    assert one.zoos("start") == tuple(f"lora-ws-mini {name}" for name in names)
    assert one.splits(one.zoos("start")[0]) == 1
    aligned = align({value.zoo: load("lora-ws-mini").subset(n) for n, value in values.items()})
    assert [len(part) for part in aligned.fold(0, 1)] == [350, 50, 100]
    photos = [
        {p for row in part for p in own.column("images")[row]}
        for own in aligned.zoos.values()
        for part in aligned.fold(0, 1)
    ]
    # Training photos of one are test photos of no other.
    assert not photos[0] & photos[5]
    assert not photos[3] & photos[2]


def test_a_photo_set_of_two_classes_is_refused():
    one, two = zoo(1, np.arange(4), 0), zoo(1, np.arange(4), 0)
    swapped = two.rows.set_column(1, "label", pa.array(["b", "a", "b", "a"]))
    with pytest.raises(DataError, match="expected one class for each photo set"):
        align({"one": one, "two": replace(two, rows=swapped)})


def test_folds_test_every_set_once_and_groups_stay_together(zoos: Zoos):
    tied = replace(zoos, groups=np.arange(SETS) // 4 * 2 + zoos.labels)
    tested = []
    for k in range(5):
        split = tied.fold(k, 5)
        tested += split.test.tolist()
        groups = [set(tied.groups[part]) for part in split]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]
    assert sorted(tested) == list(range(SETS))


@pytest.mark.parametrize("trained", [("one",), ("one", "two"), ("three", "one", "two")])
def test_as_many_adapters_are_taught_and_updates_stay(zoos: Zoos, trained: tuple[str, ...]):
    split, tested = zoos.fold(0, 5), ("one", "two")
    shown = zoos.taught(trained, tested, split, seed=3)
    parts = shown.split()
    assert [len(part) for part in parts] == [len(split.train), len(split.val), 2 * len(split.test)]
    name = shown.layout.layers[5].name
    updates = {own: np.matmul(*reversed(zoos.zoos[own].layer(name))) for own in zoos.zoos}
    found = np.matmul(*reversed(shown.layer(name)))
    kept, counts = np.concatenate([split.train, split.val]), dict.fromkeys(trained, 0)
    for row, place in enumerate(kept):
        (source,) = (own for own in trained if np.allclose(found[row], updates[own][place]))
        counts[source] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    expected = np.concatenate([updates[own][split.test] for own in tested])
    np.testing.assert_allclose(found[parts.test], expected, rtol=1e-5, atol=1e-5)
    labels, classes = shown.labels()
    assert classes == zoos.classes
    np.testing.assert_array_equal(labels[parts.test], np.tile(zoos.labels[split.test], 2))


@pytest.mark.parametrize(
    ("name", "trained", "expected"),
    [
        ("metanetworks/update_kernel", ("one",), ("one", "two", "three")),
        ("metanetworks/left_gram", ("one", "two"), ("one", "two", "three")),
        ("table1/flat_vec", ("one",), ("one", "three")),
        ("table1/stats_layer", ("two",), ("two",)),
        ("table1/flat_vec", ("one", "two"), ()),
    ],
)
def test_who_reads_other_ranks(
    zoos: Zoos, name: str, trained: tuple[str, ...], expected: tuple[str, ...]
):
    own = recipe(name, "lora-ws-mini", None, None)
    assert readable(own, zoos, trained, ("one", "two", "three")) == expected


def by_hand(hits: Mapping[tuple[tuple[str, ...], str], np.ndarray], names: tuple[str, ...]):
    """Losses of all pairs, one after the other."""
    losses = {}
    for a in names:
        for b in names:
            if a != b:
                losses[a, b] = np.mean(
                    [float(x) - float(y) for x, y in zip(hits[(a,), b], hits[(b,), b], strict=True)]
                )
    return losses


def test_what_is_lost_is_what_it_is_by_hand():
    one, rng, records, hits = spec(), np.random.default_rng(4), [], {}
    for trained in one.trainings:
        for tested in one.tested(trained):
            hits[trained, tested] = rng.random(10) < 0.4 + 0.4 * (trained == (tested,))
    # Folds in any order.
    for fold in (1, 0):
        for trained in one.trainings:
            own = {t: hits[trained, t][5 * fold : 5 * fold + 5] for t in one.tested(trained)}
            bits = {t: "".join(str(int(hit)) for hit in h) for t, h in own.items()}
            records.append(TransferRecord("r", trained, fold, 1, 1, bits))
    found = matrices(one, records)
    matrix, names = found["r", "steps"], one.zoos("steps")
    losses = by_hand(hits, names)
    assert matrix.home == pytest.approx(100 * np.mean([hits[(n,), n] for n in names]))
    assert matrix.gaps is not None
    assert matrix.gaps.mean() == pytest.approx(np.mean(list(losses.values())))
    assert matrix.worst == min(losses, key=lambda pair: losses[pair])
    assert matrix.left_out is not None
    left = [hits[matrix.others(n), n].mean() - hits[(n,), n].mean() for n in names]
    assert matrix.left_out.mean() == pytest.approx(np.mean(left))
    assert matrix.mixed is not None
    mixed = [hits[names, n].mean() - hits[(n,), n].mean() for n in names]
    assert matrix.mixed.mean() == pytest.approx(np.mean(mixed))
    # Of two values, all but one is the other.
    assert found["r", "rank"].left_out is None


def test_a_reader_that_reads_no_other_zoo_has_nothing_to_lose():
    records = [TransferRecord("r", (n,), 0, 1, 1, {n: "10"}) for n in (RECIPE, "rank=2")]
    matrix = matrices(spec(), records)["r", "rank"]
    assert matrix.home == 50
    assert matrix.gaps is matrix.mixed is matrix.worst is None
    assert matrix.share((RECIPE,), "rank=2") is None


def test_an_interval_is_that_of_scipy():
    gaps = np.random.default_rng(1).integers(-1, 2, size=150).astype(float)
    theirs = bootstrap((100 * gaps,), np.mean, method="percentile", n_resamples=2000, rng=1)
    width = 100 * gaps.std() / np.sqrt(150)
    # A quantile of 2 000 resamples varies by 0.06 standard errors; five of it, twice.
    bound = 10 * 0.06 * width
    assert np.abs(np.subtract(interval(gaps), theirs.confidence_interval)).max() < bound


def test_a_zoo_of_another_recipe_is_told():
    recipe = {"base": "digit-sd", "seed": 0, "finetune": {"steps": 1}, "photos": {"source": "x"}}
    assert same_recipe(recipe, ZooSpec()) == "finetune.steps: 1 instead of 200"
    # A zoo that was built before recipes had a precision.
    recipe["finetune"] = {"steps": 200, "rank": 1}
    assert same_recipe(recipe, ZooSpec()) == ""
    mixed = ZooSpec(finetune=FinetuneSpec(precision="bf16-mixed"))
    assert same_recipe(recipe, mixed) == "finetune.precision: 32-true instead of bf16-mixed"
    # One of a later version, which has a key that is unknown here.
    recipe["finetune"] = {"steps": 200, "rank": 1, "optimizer": "sgd"}
    assert same_recipe(recipe, ZooSpec()) == "finetune.optimizer: sgd instead of None"


def test_flags_of_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = ["--out", str(tmp_path)]
    assert main(["reproduce", "transfer", "--dataset", "lora-ws-mini", *place]) == 2
    said = capsys.readouterr().err
    assert "dataset: expected one of the flags of `transfer`" in said
    assert "--zoos" in said
    assert main(["reproduce", "table1", "--photos", "here", *place]) == 2
    assert "photos: expected one of the flags of `table1`" in capsys.readouterr().err


@pytest.mark.slow
def test_every_zoo_of_the_file_is_a_recipe_of_its_own(tmp_path: Path):
    held = load_spec(TransferSpec, eval_file("transfer"))
    built = [name for name, value in held.values.items() if not (value.cast or value.dataset)]
    whole = {name: held.zoo_spec(name, tmp_path, None, 1) for name in built}
    assert len({json.dumps(str(own)) for own in whole.values()}) == len(whole)
    for own in held.readers:
        assert recipe(own.recipe, "lora-ws-mini", None, None).kind.name == "classification"


RECIPE_FILE = """
base: digit-sd
sampling: {adapters_per_leaf: 3, min_images: 2, max_images: 4, prompt: [constant]}
finetune: {steps: 2}
"""


@pytest.mark.slow
def test_zoos_are_built_readers_trained_and_nothing_done_twice(tmp_path: Path):
    file = tmp_path / "zoo.yaml"
    file.write_text(RECIPE_FILE, encoding="utf-8")
    casts = {"float32": ValueSpec(), "int8": ValueSpec(cast="int8")}
    factors = {"rank": FACTORS["rank"], "type": casts}
    readers = ("metanetworks/update_kernel", "controls/norms_only")
    own = replace(
        spec(),
        zoo=str(file),
        folds=3,
        factors=factors,
        readers=tuple(TransferReaderSpec(name, name) for name in readers),
    )
    options = Options("transfer", tmp_path / "out")
    folder = run(own, options)
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    # Readers of raw weights do not read mixed ranks.
    mixed = len(own.trainings) * 3, (len(own.trainings) - 1) * 3
    assert tuple(sum(one["reader"] == name for one in found) for name in readers) == mixed
    for one in found:
        if one["reader"] == readers[1]:
            assert not ({"rank=2"} & set(one["hits"])) or one["trained"] == ["rank=2"]
    sets = {
        sum(
            len(one["hits"][RECIPE])
            for one in found
            if one["trained"] == [RECIPE] and one["reader"] == n
        )
        for n in readers
    }
    assert sets == {30}
    stores = {store.name for store in (folder / "zoos").iterdir() if store.is_dir()}
    assert stores == {RECIPE, "rank=2"}
    before = (folder / "report.md").read_bytes()
    run(own, options)
    assert (folder / "records.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert (folder / "report.md").read_bytes() == before
    document, seen = open_page(folder / "report.html", tmp_path)
    assert seen["images"] == seen["shown"] == len(factors)
    assert "Which reader survives" in document
    # Zoos can be given; those of another recipe are refused.
    file.write_text(RECIPE_FILE.replace("steps: 2", "steps: 1"), encoding="utf-8")
    flags = ReproduceSpec(zoos=folder / "zoos", rows=(readers[1],))
    with pytest.raises(DataError, match=r"recipe is a zoo of another recipe \(finetune"):
        run(own, Options("transfer", tmp_path / "again", flags))
