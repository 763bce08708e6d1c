"""Studies that train: what readers are shown, against counts made by hand; resuming; the page."""

from pathlib import Path

import numpy as np
import pytest

from lora_ws.collection import AdapterSet, Split
from lora_ws.errors import ConfigError
from lora_ws.experiments.study.report import write_study
from lora_ws.experiments.study.run import run_study, run_trainings
from lora_ws.experiments.study.spec import StudySpec
from lora_ws.experiments.study.trained import (
    CLEAN_VALIDATION,
    PART,
    Learned,
    adjusted_accuracy,
    found_wrong,
    read_again,
    recipe_of,
    taught_rows,
)
from lora_ws.experiments.study.trained_report import fit_errors, trained_sections
from lora_ws.experiments.study.trainings import TRAININGS, Taught
from lora_ws.learn.features import open_data

LABELS = np.arange(500) % 10
LEAVES = np.arange(500) % 50
WHOLE = Taught(LABELS, Split(np.arange(350), np.arange(350, 400), np.arange(400, 500)), LEAVES)


@pytest.mark.parametrize("name", TRAININGS)
def test_test_rows_stay_as_they_are(name: str):
    for level in TRAININGS[name].levels:
        labels, split, _ = TRAININGS[name].apply(WHOLE, level, np.random.default_rng(1))
        np.testing.assert_array_equal(split.test, WHOLE.split.test)
        np.testing.assert_array_equal(labels[split.test], LABELS[split.test])
        assert set(split.train) <= set(WHOLE.split.train)
        assert set(np.unique(labels[split.train])) == set(range(10))


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("name", ["label-noise", "label-confusion"])
def test_so_many_labels_are_wrong(name: str, share: float):
    labels, split, _ = TRAININGS[name].apply(WHOLE, share, np.random.default_rng(0))
    for part in (split.train, split.val):
        assert (labels[part] != LABELS[part]).sum() == int(share * len(part))
    if name == "label-confusion":
        wrong = labels != LABELS
        np.testing.assert_array_equal(labels[wrong], (LABELS[wrong] + 1) % 10)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_whole_leaves_are_wrong_alike(share: float):
    labels, split, _ = TRAININGS["leaf-noise"].apply(WHOLE, share, np.random.default_rng(0))
    known = np.concatenate([split.train, split.val])
    wrong = np.unique(LEAVES[known][labels[known] != LABELS[known]])
    assert len(wrong) == int(share * 50)
    for leaf in wrong:
        (told,) = np.unique(labels[known][LEAVES[known] == leaf])
        assert told != leaf % 10


def test_whole_leaves_need_a_collection_that_knows_them():
    with pytest.raises(ConfigError, match="leaf-noise: expected a collection whose card names"):
        TRAININGS["leaf-noise"].apply(WHOLE._replace(leaves=None), 0.1, np.random.default_rng(0))


def test_validation_labels_stay_true_where_asked():
    spec = recipe_of("metanetworks/logistic_delta_pca", StudySpec(spec=["x"]))
    adapters, _ = open_data(spec)
    truth = adapters.labels()[0]
    for clean in (False, True):
        shown = taught_rows(adapters, spec, "leaf-noise", 0.4, 0, clean_validation=clean)
        wrong = shown.labels()[0] != truth
        assert wrong[shown.split().val].any() != clean
        assert wrong[shown.split().train].any()
        assert not wrong[shown.split().test].any()


def test_adjusted_logits_are_those_of_balanced_classes():
    """Of two Gaussians, Bayes' rule with any shares, adjusted, is the rule with equal ones."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 4000)
    x = rng.standard_normal(4000) + 2 * truth
    shares = np.array([9, 1])
    likelihoods = np.stack([np.exp(-((x - mean) ** 2) / 2) for mean in (0, 2)], axis=1)
    joint = likelihoods * shares
    found = adjusted_accuracy(joint / joint.sum(axis=1, keepdims=True), truth, shares)
    assert found == ((x > 1) == truth).mean() > (joint.argmax(axis=1) == truth).mean()


def test_losses_tell_wrong_labels_as_pairs_of_rows_do():
    """AUROC, counted: how often a wrong label has the higher loss of the two, ties a half."""
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(4), 40), rng.integers(0, 4, 40)
    probabilities[5] = probabilities[6]
    wrong = np.arange(40) % 3 == 0
    loss = -np.log(probabilities[np.arange(40), labels])
    pairs = loss[wrong][:, None] - loss[~wrong]
    counted = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert found_wrong(probabilities, labels, wrong) == pytest.approx(counted, abs=1e-12)


def test_training_rows_are_read_again_behind_the_test_rows():
    spec = recipe_of("metanetworks/logistic_delta_pca", StudySpec(spec=["x"]))
    shown = taught_rows(open_data(spec)[0], spec, "label-noise", 0.2, 0)
    train = shown.split().train
    both = read_again(shown, train)
    test = both.split().test
    np.testing.assert_array_equal(test[:100], shown.split().test)
    np.testing.assert_array_equal(both.weights[test[100:]], shown.weights[train])
    np.testing.assert_array_equal(both.labels()[0][test[100:]], shown.labels()[0][train])
    np.testing.assert_array_equal(both.split().train, train)


@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_classes_fall_off_geometrically(ratio: float):
    labels, split, _ = TRAININGS["imbalance"].apply(WHOLE, ratio, np.random.default_rng(3))
    counts = np.sort(np.bincount(labels[split.train]))[::-1]
    np.testing.assert_array_equal(counts, np.round(35 * ratio ** (-np.arange(10) / 9)))


def test_few_shots_are_nested():
    taken = [
        set(TRAININGS["few-shot"].apply(WHOLE, n, np.random.default_rng(5)).split.train)
        for n in (2, 5, 10)
    ]
    assert [len(rows) for rows in taken] == [20, 50, 100]
    assert taken[0] <= taken[1] <= taken[2]


def test_a_reader_is_shown_the_changed_rows_of_the_same_weights():
    spec = recipe_of("metanetworks/logistic_delta_pca", StudySpec(spec=["x"]))
    assert spec.subset == "per_adapter/constant"
    adapters, _ = open_data(spec)
    shown = taught_rows(adapters, spec, "few-shot", 5.0, 0)
    assert (shown.column(PART) == "train").sum() == 50
    clean = AdapterSet.split(adapters)
    np.testing.assert_array_equal(shown.weights[shown.split().test], adapters.weights[clean.test])


def test_studies_that_train_want_a_recipe_of_classes(tmp_path: Path):
    with pytest.raises(ConfigError, match="spec: expected a recipe, as few-shot trains, got none"):
        run_trainings("few-shot", StudySpec(model=["tiny-sd"], out=tmp_path))
    with pytest.raises(ConfigError, match="expected at least one bundle or recipe"):
        run_study("weight-noise", StudySpec(out=tmp_path))
    with pytest.raises(ConfigError, match="expected recipes of classes"):
        recipe_of("tasks/attributes", StudySpec(spec=["tasks/attributes"]))


def test_too_few_levels_are_not_fitted():
    assert fit_errors({}) is None


@pytest.mark.slow
def test_a_training_study_goes_on_and_writes_a_page(tmp_path: Path):
    spec = StudySpec(spec=["metanetworks/logistic_delta_pca"], draws=2, out=tmp_path)
    found = run_trainings("few-shot", spec)
    accuracies = [np.mean([x.accuracy for x in found if x.level == n]) for n in (2.0, 35.0)]
    assert accuracies[0] < accuracies[1] - 0.1
    files = sorted((tmp_path / "trained").rglob("*.json"))
    assert len(files) == len(found) == 2 * len(TRAININGS["few-shot"].levels)
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    assert run_trainings("few-shot", spec) == found
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    page, (grid,) = write_study([], tmp_path, found)
    assert "Fits of" in grid.caption
    assert len((tmp_path / "trained.jsonl").read_text(encoding="utf-8").splitlines()) == len(found)
    assert "few-shot" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_losses_of_training_rows_find_wrong_labels(tmp_path: Path):
    spec = StudySpec(spec=["metanetworks/logistic_delta_pca"], draws=1, out=tmp_path)
    found = run_trainings("label-noise", spec)
    for one in found:
        assert (one.wrong_found is None) == (one.level == 0)
        assert one.n_test == 100
    assert min(one.wrong_found or 1.0 for one in found) > 0.6
    page, (grid,) = write_study([], tmp_path, found)
    assert grid.head[-1] == "AUROC of finding wrong labels, %"
    assert [row[-1].text == "–" for row in grid.rows] == [True, False, False, False]
    assert "finding wrong labels" in page.read_text(encoding="utf-8")


def test_readers_with_clean_validation_labels_stand_apart(tmp_path: Path) -> None:
    found = [
        Learned(f"reader{tail}", "data", "label-noise", level, 0, 10, 10, 1 - level, 0.5, 0.5)
        for tail in ("", CLEAN_VALIDATION)
        for level in (0.0, 0.4)
    ]
    sections, grids = trained_sections(found, tmp_path)
    assert [one.title for one in sections] == ["label-noise", "label-noise, clean validation"]
    assert [len(grid.rows) for grid in grids] == [2, 2]
    assert {row[0].text for grid in grids for row in grid.rows} == {"reader"}
    charts = {file.name for file in tmp_path.glob("*.png")}
    assert charts == {"label-noise.png", "label-noise-clean-validation.png"}
