"""What every registered task promises, by independent computations."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats
from sklearn import metrics as reference
from sklearn.covariance import LedoitWolf
from sklearn.metrics.pairwise import euclidean_distances
from tolerances import EXACT, rounding

from lora_ws.bundle import Bundle
from lora_ws.collection import AdapterSet
from lora_ws.errors import ConfigError, DataError
from lora_ws.featurizers import FlatVec
from lora_ws.functional.retrieval import (
    average_precisions,
    chance_average_precision,
    mahalanobis_distance,
    nearest_classes,
    neighbour_distance,
)
from lora_ws.functional.thresholds import f1_threshold
from lora_ws.learn.features import Prepared, prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.run import fit_seed, fit_seeds
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec
from lora_ws.learn.tasks import (
    TASKS,
    Embedding,
    MultiLabel,
    MultiTask,
    Regression,
    Task,
    ZeroShot,
    task_of,
)
from lora_ws.models import MLP

Make = Callable[..., ExperimentSpec]
# What a spec needs beside the task's name.
GIVEN: dict[str, dict[str, Any]] = {
    "classification": {},
    "multilabel": {"label": "traits"},
    "regression": {"label": "size"},
    "embedding": {},
    "zero_shot": {},
    "multitask": {
        "task": MultiTask(
            tasks={
                "category_label": "classification",
                "traits": "multilabel",
                "size": "regression",
            }
        )
    },
}
FIT = FitSpec(lr=5e-4, max_epochs=5)


@pytest.fixture
def make(make_zoo: Callable[..., AdapterSet], tmp_path: Path) -> Make:
    """An experiment of a task on adapters whose labels the weights tell."""

    def spec_of(task: str, /, classes: int = 3, **changes: Any) -> ExperimentSpec:
        adapters = make_zoo(n=max(90, 12 * classes), classes=classes)
        codes, names = adapters.labels()
        traits = [[names[code], *(["even"] if code % 2 == 0 else [])] for code in codes]
        rows = adapters.rows.append_column("traits", pa.array(traits))
        rows = rows.append_column("size", pa.array(codes + np.arange(len(codes)) % 7 / 7))
        for trait in ("even", names[0]):
            rows = rows.append_column(trait, pa.array([int(trait in own) for own in traits]))
        store = str(replace(adapters, rows=rows).save(tmp_path / "store"))
        given = {"featurizer": FlatVec(), "model": MLP(hidden=(16,)), "fit": FIT, "seeds": 1}
        given |= {"task": task, "trainer": TrainerSpec("cpu")} | GIVEN[task]
        if task == "zero_shot":
            np.save(tmp_path / "texts.npy", np.eye(len(names)))
            given["task"] = ZeroShot(texts=tmp_path / "texts.npy")
        return ExperimentSpec(store, **(given | changes))

    return spec_of


def outputs_and_targets(prepared: Prepared, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(rows, prepared.task.outputs, generator=generator).double()
    return outputs, torch.from_numpy(prepared.labels[prepared.split.train[:rows]])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_in_both_engines_alike(make: Make, name: str) -> None:
    spec = make(name)
    prepared = prepare(spec)
    one = fit_seed(spec, prepared, 0)
    batched = replace(spec, trainer=TrainerSpec("cpu", engine="batched"))
    (stacked,) = fit_seeds(batched, prepared, [0])
    losses = [entry["train_loss"] for entry in one.history]
    assert losses[-1] < losses[0]
    assert one.record.task == name
    assert one.record.classes == prepared.task.classes
    assert prepared.task.selects in one.record.val
    assert set(one.record.test) == set(stacked.record.test)
    quality = f"val_{prepared.task.quality}"
    for ours, other in zip(one.history, stacked.history, strict=True):
        for key in ("train_loss", "val_loss", quality):
            assert ours[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3), key


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_losses_add_up_and_models_stay_apart(make: Make, name: str, classes: int) -> None:
    prepared = prepare(make(name, classes=classes))
    task, (outputs, targets) = prepared.task, outputs_and_targets(prepared, 12)
    each = task.loss(outputs, targets, "none")
    assert each.shape == task.score(outputs, targets).shape == (12,)
    assert float(task.loss(outputs, targets)) == pytest.approx(float(each.sum()), rel=EXACT)
    assert len(task.predict(outputs)) == 12
    together = torch.stack([outputs, outputs.flip(0)])
    both = torch.stack([targets, targets])
    torch.testing.assert_close(task.loss(together, both, "none")[0], each)
    torch.testing.assert_close(task.predict(together)[0], task.predict(outputs))
    torch.testing.assert_close(task.score(together, both)[0], task.score(outputs, targets))
    first = task.heads[0].task if task.heads else task
    assert len(task.classes) in (0, first.outputs)


@pytest.mark.parametrize("name", TASKS)
def test_a_bundle_says_the_same_or_is_refused(make: Make, name: str, tmp_path: Path) -> None:
    spec = make(name)
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    if not prepared.task.gives_probabilities:
        with pytest.raises(ConfigError, match=f"a bundle holds probabilities; a {name} has none"):
            make_bundle(fitted)
        return
    made = make_bundle(fitted)
    read = Bundle.load(made.save(tmp_path / "bundle"))
    rows = np.asarray(prepared.adapters.weights[prepared.split.test])
    found = made.predict_proba(rows)
    np.testing.assert_array_equal(read.predict_proba(rows), found)
    temperature = made.confidence.calibration.temperature  # type: ignore[union-attr]
    outputs = fitted.network(torch.from_numpy(rows)).detach().double() / temperature
    expected = prepared.task.predict(outputs)[:, : len(made.classes)]
    np.testing.assert_allclose(found, expected, rtol=rounding(600), atol=1e-6)
    assert read.confidence.thresholds == made.confidence.thresholds
    for prediction in read.predict_batch(rows):
        assert set(prediction.probabilities) == set(prepared.task.classes)


def test_labels_of_a_bundle_reach_their_thresholds(make: Make) -> None:
    spec = make("multilabel", fit=FitSpec(lr=3e-3, max_epochs=40))
    fitted = fit_seed(spec, prepare(spec), 0)
    bundle, prepared = make_bundle(fitted), fitted.job.prepared
    rows = np.asarray(prepared.adapters.weights[prepared.split.test])
    least = dict(zip(bundle.classes, bundle.confidence.thresholds, strict=True))
    told = set()
    held = bundle.confidence.calibration
    assert held is not None
    val = prepared.split.val
    found = bundle.predict_arrays(np.asarray(prepared.adapters.weights[val]))
    # At most one in ten labels that apply to the rows it was fitted on is not in their sets.
    assert found.sets[prepared.labels[val] > 0].mean() >= 1 - held.alpha
    for one in bundle.predict_batch(rows):
        expected = {name for name, p in one.probabilities.items() if p >= least[name]}
        assert set(one.labels) == expected
        assert one.label in (None, ", ".join(one.labels) or "none of the labels")
        told.add(one.labels)
    assert len(told) > 2
    assert all(f"{name} {value:.2f}" in bundle.model_card() for name, value in least.items())


@pytest.mark.parametrize("labels", [2, 3, 10])
def test_metrics_of_labels_are_those_of_sklearn(labels: int) -> None:
    rng = np.random.default_rng(labels)
    truth = (rng.random((3, 40, labels)) < 0.4).astype(np.float32)
    truth[2, :, 0] = 1  # a label without both values, left out of AUROC and average precision
    scores = (rng.random(truth.shape) * 0.6 + 0.3 * truth).astype(np.float32)
    task = MultiLabel().fit(truth[0], tuple(f"l{k}" for k in range(labels)))
    held = {
        part: (torch.from_numpy(scores[k]), torch.from_numpy(truth[k]))
        for k, part in enumerate(("train", "val", "test"))
    }
    values = task.measure(held.__getitem__, "test").values
    y, p, told = truth[2], scores[2], slice(1, None)
    assert values["auroc"] == pytest.approx(
        reference.roc_auc_score(y[:, told], p[:, told], average="macro")
    )
    assert values["average_precision"] == pytest.approx(
        reference.average_precision_score(y[:, told], p[:, told], average="macro")
    )
    # A constant ranks nothing: its average precision is the label's share.
    flat = np.full_like(y[:, told], 0.5)
    assert values["average_precision_constant"] == pytest.approx(
        reference.average_precision_score(y[:, told], flat, average="macro")
    )
    said = p >= task.thresholds(scores[1], truth[1])
    assert values["f1_macro"] == pytest.approx(reference.f1_score(y, p >= 0.5, average="macro"))
    assert values["f1_micro_tuned"] == pytest.approx(reference.f1_score(y, said, average="micro"))
    ones = np.ones_like(y)
    assert values["f1_macro_constant"] == pytest.approx(
        reference.f1_score(y, ones, average="macro")
    )
    none: Any = {"zero_division": 1.0}
    jaccard = reference.jaccard_score(y, p > 0.5, average="samples", **none)
    assert values["jaccard"] == pytest.approx(jaccard)


@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, applies = rng.integers(0, 9, 30) / 8, rng.random(30) < 0.3
    applies[0] = True
    best = max(reference.f1_score(applies, found >= t) for t in np.arange(0, 1.1, 1 / 16))
    ours = f1_threshold(found, applies)
    assert reference.f1_score(applies, found >= ours) == pytest.approx(best)
    assert f1_threshold(found, np.zeros(30, bool)) == 0.5


def test_labels_come_from_columns_too(make: Make) -> None:
    columns = ("even", "class0")
    spec = make("multilabel")
    listed = prepare(spec)
    given = prepare(replace(spec, label="even, class0"))
    with pytest.warns(FutureWarning, match="`task.columns` is deprecated.*`label: even,class0`"):
        old = replace(spec, task=MultiLabel(columns=columns), label=None)
    assert old.label == "even,class0"
    places = [listed.task.classes.index(name) for name in columns]
    np.testing.assert_array_equal(given.labels, listed.labels[:, places])
    assert given.task.classes == columns


def test_a_list_of_numbers_is_its_last_or_their_mean(make: Make) -> None:
    spec = make("regression")
    adapters = prepare(spec).adapters
    losses = [[1.0, 0.5 + k, k / 3][: 1 + k % 3] for k in range(len(adapters))]
    adapters = replace(adapters, rows=adapters.rows.append_column("losses", pa.array(losses)))
    last, _ = Regression().read(adapters, "losses")
    mean, _ = Regression(reduce="mean").read(adapters, "losses")
    np.testing.assert_array_equal(last, np.array([one[-1] for one in losses], np.float32))
    np.testing.assert_allclose(mean, [sum(one) / len(one) for one in losses], rtol=rounding(3))
    with pytest.raises(DataError, match="expected finite numbers, got list"):
        MultiLabel().read(adapters, "losses,even")
    none = pa.array([[], *losses[1:]], adapters.rows["losses"].type)
    emptied = replace(adapters, rows=adapters.rows.append_column("none", none))
    with pytest.raises(DataError, match="a number or more in each row's list, got 1 empty"):
        Regression().read(emptied, "none")


def test_pos_weight_counts_rare_labels_more() -> None:
    truth = np.zeros((20, 2), np.float32)
    truth[:1, 0], truth[:5, 1] = 1, 1
    task = MultiLabel(pos_weight=True).fit(truth, ("rare", "known"))
    outputs = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    yes, weight = torch.from_numpy(truth).double(), torch.tensor([10.0, 3.0]).double()
    p = outputs.sigmoid()
    expected = -(weight * yes * p.log() + (1 - yes) * (1 - p).log()).mean(1).sum()
    assert float(task.loss(outputs, torch.from_numpy(truth))) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("multilabel", {"label": None}, "`category_label`.*: expected lists of text, got string"),
        ("multilabel", {"label": "even,size"}, "label: expected 0 and 1 in each of even, size"),
        ("regression", {"label": None}, "`category_label`.*: expected finite numbers, got string"),
        ("regression", {"label": "traits"}, "expected finite numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    make: Make, task: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(make(task, **changes))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_label_of_another_task_is_refused_before_rows_are_read(task: str) -> None:
    with pytest.raises(ConfigError, match=f"task={task}: expected `label`, a column of"):
        ExperimentSpec("lora-ws-mini", task=task)


def test_a_task_is_a_spec() -> None:
    for name in TASKS:
        task = task_of(name)
        assert isinstance(task, Task)
        assert task.name == name
        assert task_of(task) is task


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_is_that_of_independent_computations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, queries = rng.standard_normal((30, 4)), rng.standard_normal((8, 4))
    known, asked = rng.integers(0, 3, 30), rng.integers(0, 3, 8)
    excluded = rng.random((8, 30)) < 0.2
    near, relevant = queries @ gallery.T, asked[:, None] == known
    found = average_precisions(near, relevant, excluded)
    named = nearest_classes(near, known, excluded, k=4)
    for row in range(8):
        kept = ~excluded[row]
        expected = reference.average_precision_score(relevant[row, kept], near[row, kept])
        assert found[row] == pytest.approx(expected)
        best = sorted(np.flatnonzero(kept), key=lambda at: -near[row, at])[:4]
        votes = {
            k: (sum(known[best] == k), near[row, best][known[best] == k].sum()) for k in (0, 1, 2)
        }
        assert named[row] == max(votes, key=votes.__getitem__)
    distances = euclidean_distances(queries, gallery) ** 2
    np.testing.assert_allclose(
        neighbour_distance(gallery, queries), np.sort(distances, 1)[:, :2].mean(1)
    )
    covariance = LedoitWolf().fit(gallery).covariance_
    centred = queries - gallery.mean(0)
    expected = (centred @ np.linalg.inv(covariance) * centred).sum(1)
    np.testing.assert_allclose(mahalanobis_distance(gallery, queries), expected)


@pytest.mark.parametrize(("relevant", "rows"), [(1, 4), (2, 5), (3, 3), (4, 6)])
def test_chance_is_the_mean_over_all_orders(relevant: int, rows: int) -> None:
    places = np.array(list(combinations(range(rows), relevant)))
    hits = np.zeros((len(places), rows), bool)
    np.put_along_axis(hits, places, True, axis=1)
    ranks = np.broadcast_to(-np.arange(rows, dtype=float), hits.shape)
    every = average_precisions(ranks, hits, np.zeros_like(hits))
    found = chance_average_precision(np.array([relevant]), np.array([rows]))
    assert every.mean() == pytest.approx(found[0])


def test_embeddings_contrast_rows_of_a_batch() -> None:
    outputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    found = Embedding(temperature=0.2).loss(outputs, labels[:, None], "none")
    z = outputs / outputs.norm(dim=1, keepdim=True)
    for i in range(7):
        others = [j for j in range(7) if j != i]
        total = sum(math.exp(float(z[i] @ z[j]) / 0.2) for j in others)
        own = [
            -math.log(math.exp(float(z[i] @ z[j]) / 0.2) / total)
            for j in others
            if labels[i] == labels[j]
        ]
        assert float(found[i]) == pytest.approx(np.mean(own) if own else 0.0)
    one = torch.randn(1, 5, requires_grad=True)
    Embedding().loss(one, labels[:1, None]).backward()
    assert one.grad is not None
    assert torch.isfinite(one.grad).all()


def test_rows_of_the_same_photos_are_no_find() -> None:
    """A query whose only likeness is its own photos' adapter finds nothing else."""
    known = torch.eye(4)
    keys = torch.tensor([[0, 7], [0, 8], [1, 9], [1, 10]])
    asked = torch.tensor([[0, 7], [1, 11]])
    parts = {"train": (known, keys), "test": (known[[0, 2]], asked)}
    values = Embedding(n_neighbors=1).fit(keys.numpy()).measure(parts.__getitem__, "test").values
    # The first sees rows 1 to 3, equally far, in order: its class comes first. The second sees all.
    assert values["map"] == pytest.approx((1.0 + (1 + 2 / 4) / 2) / 2)
    chance = chance_average_precision(np.array([1, 2]), np.array([3, 4]))
    assert values["map_chance"] == pytest.approx(chance.mean())


def test_numbers_are_measured_as_scipy_and_sklearn_do() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(4, 16, 50).astype(np.float32)
    guess = (truth + 3 * rng.standard_normal(50)).astype(np.float32)
    task = Regression().fit(truth)
    values = task.measure(
        lambda _: (torch.from_numpy(guess), torch.from_numpy(truth)), "test"
    ).values
    bound = rounding(50)
    assert values["r2"] == pytest.approx(reference.r2_score(truth, guess), abs=bound)
    assert values["mae"] == pytest.approx(reference.mean_absolute_error(truth, guess), rel=bound)
    rmse = reference.root_mean_squared_error(truth, guess)
    assert values["rmse"] == pytest.approx(rmse, rel=bound)
    assert values["spearman"] == pytest.approx(stats.spearmanr(guess, truth)[0], abs=bound)
    assert values["kendall"] == pytest.approx(stats.kendalltau(guess, truth)[0])
