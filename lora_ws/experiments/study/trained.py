"""Run the studies that train: a recipe on changed training rows, tested on rows as they are."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from lora_ws.collection import AdapterSet
from lora_ws.collection.card import SplitRule
from lora_ws.config import load_spec
from lora_ws.errors import ConfigError
from lora_ws.experiments.recipes import recipe_file
from lora_ws.experiments.study.spec import StudySpec
from lora_ws.experiments.study.trainings import TRAININGS, Taught
from lora_ws.learn.features import open_data, split_rows
from lora_ws.learn.metrics import class_metrics, computed
from lora_ws.learn.run import fit_shown
from lora_ws.learn.spec import ExperimentSpec, slug
from lora_ws.memory import check_room
from lora_ws.report.progress import progress
from lora_ws.workers import current_engine

PART, TRUTH, RESULTS, LEAF = "study_part", "study_truth", "trained", "leaf"
CLEAN_VALIDATION = ", clean validation"


class Job(NamedTuple):
    """One reader to train.

    Attributes:
        recipe: name or file of its recipe.
        spec: the recipe, on the collection asked for.
        study: name of the training.
        level: how much of it.
        draw: number of the draw, and the seed of the training.
        clean_validation: whether validation labels stay true.
        file: where the result goes.
    """

    recipe: str
    spec: ExperimentSpec
    study: str
    level: float
    draw: int
    clean_validation: bool
    file: Path


@dataclass(frozen=True)
class Learned:
    """How well a reader that was trained on changed rows reads rows as they are.

    Attributes:
        model: the recipe, as it was given.
        data: collection and subset.
        study: name of the training.
        level: how much of it.
        draw: number of the draw.
        n_train: rows that it was trained on.
        n_test: rows that it is tested on.
        accuracy: on them.
        f1: macro average.
        rare_recall: mean recall of the third of the classes with the fewest training rows.
        adjusted: accuracy after logit adjustment; null in results of earlier versions.
        wrong_found: AUROC of the losses of training rows for finding wrong labels; null where none
            is wrong, and in results of earlier versions.
    """

    model: str
    data: str
    study: str
    level: float
    draw: int
    n_train: int
    n_test: int
    accuracy: float
    f1: float
    rare_recall: float
    adjusted: float | None = None
    wrong_found: float | None = None


def run_trained(names: Sequence[str], spec: StudySpec) -> list[Learned]:
    """Train every recipe at every level and draw; what has a result is not trained again.

    Args:
        names: of trainings.
        spec: with which recipes, on what.

    Raises:
        ConfigError: a recipe is not of classes.
        TrainingError: a training failed; what was finished is kept.
    """
    jobs = [job for name in spec.spec or () for job in _jobs(name, names, spec)]
    todo = [job for job in jobs if not job.file.is_file()]
    with progress("train", len(jobs), len(jobs) - len(todo)) as advance:
        shown = 0

        def tick() -> None:
            nonlocal shown
            done = sum(job.file.is_file() for job in todo)
            advance(done - shown)
            shown = done

        current_engine().work_through(perform, todo, spec.processes, tick)
    return [Learned(**json.loads(job.file.read_text(encoding="utf-8"))) for job in jobs]


def recipe_of(name: str, spec: StudySpec) -> ExperimentSpec:
    """A recipe on the collection asked for, of which the card's main subset is taken.

    Raises:
        ConfigError: there is no such recipe, or it is not of classes.
    """
    own = load_spec(ExperimentSpec, name if Path(name).is_file() else recipe_file(name))
    if own.kind.name != "classification":
        raise ConfigError(f"spec: expected recipes of classes, got task {own.kind.name} in {name}")
    own = replace(own, dataset=spec.dataset or own.dataset, subset=spec.subset or own.subset)
    adapters, subset = open_data(own)
    return replace(own, subset=own.subset or adapters.card.main_subset or subset or None)


def taught_rows(
    adapters: AdapterSet,
    spec: ExperimentSpec,
    study: str,
    level: float,
    draw: int,
    clean_validation: bool = False,
) -> AdapterSet:
    """The collection as a reader is shown it: labels and parts changed, test rows as they are.

    Args:
        adapters: of the subset.
        spec: says label and split.
        study: name of the training.
        level: how much of it.
        draw: seed.
        clean_validation: whether validation rows keep their own labels.

    Raises:
        ConfigError: the study changes whole leaf classes, and the card names none.
    """
    label = spec.label or adapters.card.label
    labels, classes = adapters.labels(spec.label)
    before = Taught(labels, split_rows(adapters, spec), _leaves(adapters))
    after = TRAININGS[study].apply(before, level, np.random.default_rng(draw))
    if clean_validation:
        after.labels[before.split.val] = labels[before.split.val]
    part = np.full(len(adapters), "", dtype=object)
    for name, rows in after.split._asdict().items():
        part[rows] = name
    named = pa.array(np.array(classes)[after.labels].tolist())
    table = adapters.rows.set_column(adapters.rows.column_names.index(label), label, named)
    table = table.append_column(PART, pa.array(part.tolist()))
    table = table.append_column(TRUTH, pa.array(np.array(classes)[labels].tolist()))
    rule = SplitRule(column=PART)
    card = replace(adapters.card, label=label, classes=classes, split=rule, subset="", subsets=())
    card = replace(card, main_subset="", label_from={}, bundled=False)
    changed = replace(adapters, rows=table, card=card, manifest={})
    kept = np.flatnonzero(part != "")
    if len(kept) < len(changed):
        # They are copied, unless they follow each other.
        size = 4 * len(kept) * adapters.layout.size
        check_room(f"{study}, {len(kept)} adapters", size)
    return changed.select(kept)


def _leaves(adapters: AdapterSet) -> Int[np.ndarray, " rows"] | None:
    column = adapters.card.group_columns.get(LEAF)
    return None if column is None else np.unique(adapters.column(column), return_inverse=True)[1]


def perform(job: Job) -> None:
    """Train one reader and write its result."""
    adapters, subset = open_data(job.spec)
    clean = job.clean_validation
    shown = taught_rows(adapters, job.spec, job.study, job.level, job.draw, clean)
    labels, classes = shown.labels()
    train = shown.split().train
    wrong = shown.column(shown.card.label)[train] != shown.column(TRUTH)[train]
    fitted = fit_shown(job.spec, read_again(shown, train) if wrong.any() else shown, job.draw)
    scores, truth = fitted.test.scores, fitted.test.truth
    tested = len(shown.split().test)
    read = computed(class_metrics(len(classes)), scores[:tested], truth[:tested])
    counts = np.bincount(labels[train], minlength=len(classes))
    confusion = np.array(read.confusion)
    recall = np.diag(confusion) / np.maximum(confusion.sum(axis=1), 1)
    rare = np.argsort(counts, kind="stable")[: max(1, len(counts) // 3)]
    learned = Learned(
        job.recipe + (CLEAN_VALIDATION if clean else ""),
        " ".join(filter(None, [adapters.card.name, subset])),
        *(job.study, job.level, job.draw),
        *(int(counts.sum()), tested, read.values["accuracy"], read.values["f1"]),
        float(recall[rare].mean()),
        adjusted_accuracy(read.scores.numpy(), read.truth.numpy(), counts),
        found_wrong(scores[tested:].numpy(), labels[train], wrong) if wrong.any() else None,
    )
    job.file.parent.mkdir(parents=True, exist_ok=True)
    draft = job.file.with_suffix(".partial")
    draft.write_text(json.dumps(asdict(learned)), encoding="utf-8")
    draft.replace(job.file)


def read_again(shown: AdapterSet, rows: Int[np.ndarray, " rows"]) -> AdapterSet:
    """The same with some rows once more behind the test rows."""
    table = shown.select(rows).rows
    table = table.set_column(table.column_names.index(PART), PART, pa.array(["test"] * len(table)))
    check_room(f"{len(rows)} training adapters, read again", 4 * len(rows) * shown.layout.size)
    both = shown.select(np.concatenate([np.arange(len(shown)), rows]))
    return replace(both, rows=pa.concat_tables([shown.rows, table]))


def found_wrong(
    probabilities: Float[np.ndarray, "rows classes"],
    labels: Int[np.ndarray, " rows"],
    wrong: Bool[np.ndarray, " rows"],
) -> float:
    """AUROC of the negative log-likelihood of each row's label for telling wrong labels.

    Args:
        probabilities: of each class.
        labels: number of the class that each row is said to be of.
        wrong: whether it is not of that class; some are, some are not.

    Example:
        >>> sure = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> found_wrong(sure, np.array([0, 0, 0]), np.array([False, True, False]))
        1.0
    """
    from sklearn.metrics import roc_auc_score

    likely = probabilities[np.arange(len(labels)), labels]
    return float(roc_auc_score(wrong, -likely))


def adjusted_accuracy(
    probabilities: Float[np.ndarray, "rows classes"],
    truth: Int[np.ndarray, " rows"],
    counts: Int[np.ndarray, " classes"],
) -> float:
    """Accuracy after logit adjustment (Menon et al., 2021): the highest ``log p - log π`` wins.

    π are the shares of the classes in the training rows.

    Args:
        probabilities: of each class; of readers without any, the softmax of their scores.
        truth: number of the class of each row.
        counts: training rows of each class, all above 0.

    Example:
        >>> probabilities = np.array([[0.6, 0.4], [0.9, 0.1]])
        >>> adjusted_accuracy(probabilities, np.array([1, 0]), np.array([3, 1]))
        1.0
    """
    small = np.finfo(np.float32).tiny
    logits = np.log(np.maximum(probabilities, small)) - np.log(counts / counts.sum())
    return float((logits.argmax(axis=1) == truth).mean())


def _jobs(name: str, studies: Sequence[str], spec: StudySpec) -> Iterator[Job]:
    own = recipe_of(name, spec)
    home = spec.out / RESULTS / slug(Path(name).with_suffix("").as_posix().replace("/", "-"))
    key: list[Any] = [slug(str(own.dataset)), slug(own.subset or "whole")]
    key += [slug(CLEAN_VALIDATION)] if spec.clean_validation else []
    leaves = LEAF in open_data(own)[0].card.group_columns
    for study in studies:
        # One that is asked for by name says what it needs.
        if TRAININGS[study].by_leaf and not leaves and len(studies) > 1:
            continue
        for level in TRAININGS[study].levels:
            for draw in range(spec.draws):
                file = home.joinpath(*key, f"{study}-{level:g}-{draw}.json")
                yield Job(name, own, study, level, draw, spec.clean_validation, file)
