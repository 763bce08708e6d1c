"""Run a study: change adapters that a classifier has not seen, and let it read them again."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ws import journal
from lora_ws.adapters import Layout
from lora_ws.adapters.projection import project_rows
from lora_ws.bundle import Bundle
from lora_ws.bundle.bundle import MAX_RANK
from lora_ws.config import nearest
from lora_ws.errors import ConfigError
from lora_ws.experiments.study.changes import (
    CHANGES,
    Level,
    bytes_of,
    changed_rows,
    partners,
)
from lora_ws.experiments.study.spec import StudySpec
from lora_ws.experiments.study.trained import Learned, recipe_of, run_trained
from lora_ws.experiments.study.trainings import TRAININGS
from lora_ws.learn.labelled import UNKNOWN, open_for, places
from lora_ws.learn.run import run
from lora_ws.learn.run_folder import BUNDLE
from lora_ws.learn.spec import slug
from lora_ws.memory import check_room
from lora_ws.report.progress import progress

ALL, CLEAN, RECORDS = "all", "unchanged", "records.jsonl"


class Rows(NamedTuple):
    """Test adapters of a collection.

    Attributes:
        name: of the collection and subset.
        weights: ``[adapters, params]``.
        layout: of the weights.
        truth: the bundle's number of each class.
    """

    name: str
    weights: np.ndarray
    layout: Layout
    truth: np.ndarray


@dataclass(frozen=True)
class Read:
    """What a reader made of the test adapters at one level of a change.

    Attributes:
        model: the bundle, as it was given.
        data: collection and subset.
        study: name of the change, or `CLEAN`.
        level: how much of it.
        draw: number of the draw.
        right: for each adapter ``1`` where the most probable class is its own, else ``0``.
        flipped: share whose most probable class is not what it was before.
        nll: mean negative logarithm of the probability of the true class.
        abstained: share that the reader does not answer.
        either: of merges, the share whose most probable class is that of one of the two.
        both: of merges, the share whose two most probable classes are those of the two.
    """

    model: str
    data: str
    study: str
    level: Level
    draw: int
    right: str
    flipped: float
    nll: float
    abstained: float
    either: float | None = None
    both: float | None = None

    @property
    def hits(self) -> np.ndarray:
        """Whether each adapter is classified correctly ``[adapters]``."""
        return np.array([bit == "1" for bit in self.right])


def run_study(name: str, spec: StudySpec) -> list[Read]:
    """Read changed test adapters at every level and draw; what records hold is not read again.

    Args:
        name: of a change, or ``all``.
        spec: with which classifiers, on what.

    Raises:
        ConfigError: there is no such study, or neither a bundle nor a recipe.
        DataError: a bundle and its collection have no class in common.
    """
    chosen = [study for study in studies_of(name) if study in CHANGES]
    if not spec.model and not spec.spec:
        raise ConfigError("model, spec: expected at least one bundle or recipe, got neither")
    if not chosen:
        return []
    spec.out.mkdir(parents=True, exist_ok=True)
    path = spec.out / RECORDS
    held = {key_of(read): read for read in read_records(path)}
    found = []
    for model, place in bundles_of(spec).items():
        bundle = Bundle.from_pretrained(place)
        rows = test_rows(bundle, spec.dataset, spec.subset, chosen)
        asked = [(CLEAN, CLEAN, 0), *_asked(chosen, rows.layout, spec.draws)]
        clean = _predicted(bundle, rows.weights, rows.layout)[0].argmax(axis=1)
        with progress(model, len(asked)) as advance:
            for study, level, draw in asked:
                key = (model, rows.name, study, level, draw)
                if key not in held:
                    held[key] = _read(bundle, model, rows, clean, study, level, draw)
                    journal.append(path, [asdict(held[key])])
                found.append(held[key])
                advance()
    return found


def bundles_of(spec: StudySpec) -> dict[str, str]:
    """Bundles by their names in the report; those of recipes are trained, once."""
    found = {model: model for model in spec.model or ()}
    for name in spec.spec or ():
        own = replace(recipe_of(name, spec), seeds=1)
        folder = spec.out / "bundles" / slug(Path(name).with_suffix("").as_posix())
        run(own, folder)
        found[name] = str(folder / BUNDLE)
    return found


def run_trainings(name: str, spec: StudySpec) -> list[Learned]:
    """Run the studies asked for that train, on the recipes of a spec.

    Raises:
        ConfigError: one is asked for by name, and there is no recipe.
    """
    chosen = [study for study in studies_of(name) if study in TRAININGS]
    if chosen and name != ALL and not spec.spec:
        raise ConfigError(f"spec: expected a recipe, as {name} trains, got none")
    return run_trained(chosen, spec)


def studies_of(name: str) -> list[str]:
    """Names of the studies asked for: changes of test rows, and of what is trained on."""
    known = [*CHANGES, *TRAININGS]
    if name != ALL and name not in known:
        near = nearest(name, [*known, ALL], few=len(known) + 1)
        raise ConfigError(f"no study `{name}`{near}")
    return known if name == ALL else [name]


def key_of(read: Read) -> tuple[Any, ...]:
    """What tells a reading from the others."""
    return read.model, read.data, read.study, read.level, read.draw


def read_records(path: Path) -> list[Read]:
    """Readings of an earlier run."""
    return [Read(**line) for line in journal.read(path)] if path.is_file() else []


def test_rows(
    bundle: Bundle, dataset: str | None, subset: str | None, studies: Sequence[str]
) -> Rows:
    """Test rows of the classes that a bundle knows.

    Args:
        bundle: the classifier.
        dataset: a collection; None takes that of training.
        subset: of it.
        studies: names of changes that there has to be room for.

    Raises:
        ConfigError: no row is of a class that it knows, or there is no room for what a study makes
            of the rows.
    """
    if bundle.confidence.thresholds:
        raise ConfigError("model: expected classes that exclude each other, got a bundle of labels")
    adapters, subset = open_for(bundle, dataset, subset)
    labels, classes = adapters.labels()
    rows = adapters.split().test
    truth = places(bundle.classes, classes)[labels[rows]]
    rows, truth = rows[truth != UNKNOWN], truth[truth != UNKNOWN]
    if not len(rows):
        known = ", ".join(bundle.classes)
        raise ConfigError(f"dataset: no test adapter of {adapters.card.name} is of {known}")
    name = " ".join(filter(None, [adapters.card.name, subset]))
    for study in studies:
        needed = bytes_of(len(rows), adapters.layout, CHANGES[study])
        check_room(f"{study} of {len(rows)} test adapters", needed, share=1)
    return Rows(name, np.asarray(adapters.weights[rows]), adapters.layout, truth)


def _asked(chosen: Sequence[str], layout: Layout, draws: int) -> Iterator[tuple[str, Level, int]]:
    rank = max(layer.rank for layer in layout.layers)
    for study in chosen:
        change = CHANGES[study]
        levels = [level for level in change.levels if study != "truncation" or int(level) < rank]
        for level in levels:
            for draw in range(draws if change.draws else 1):
                yield study, level, draw


def _read(
    bundle: Bundle, model: str, rows: Rows, clean: np.ndarray, study: str, level: Level, draw: int
) -> Read:
    weights, layout, change = rows.weights, rows.layout, CHANGES.get(study)
    if change:
        weights, layout = changed_rows(weights, layout, change, level, rows.truth, draw)
    probabilities, abstained = _predicted(bundle, weights, layout)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    own = probabilities[np.arange(len(order)), rows.truth]
    either = both = None
    if change and change.merges:
        either, both = _of_both(order, rows.truth, rows.truth[partners(rows.truth, draw)])
    return Read(
        model,
        rows.name,
        study,
        level,
        draw,
        "".join(str(int(hit)) for hit in order[:, 0] == rows.truth),
        float((order[:, 0] != clean).mean()),
        float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean()),
        float(abstained.mean()),
        either,
        both,
    )


def _of_both(order: np.ndarray, own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    top = order[:, :2]
    either = (top[:, 0] == own) | (top[:, 0] == other)
    both = (top == own[:, None]).any(axis=1) & (top == other[:, None]).any(axis=1)
    return float(either.mean()), float(both.mean())


def _predicted(
    bundle: Bundle, weights: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and whether the bundle abstains, of rows of any rank."""
    rank = max(layer.rank for layer in layout.layers)
    read_as_is = bundle.layout == layout or (bundle.any_rank and rank <= MAX_RANK)
    if not read_as_is:
        weights, layout = project_rows(weights, layout, bundle.layout), bundle.layout
    found = bundle.predict_arrays(weights, layout)
    if not read_as_is and bundle.gauge == "raw":
        found = found.abstain(True, "projected")
    return found.probabilities, found.reasons != ""
