"""Train every reader on every zoo and mixture, and test it on the others."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from lora_ws.collection import AdapterSet
from lora_ws.config import load_spec
from lora_ws.experiments.options import Options, asked_for
from lora_ws.experiments.recipes import recipe_file
from lora_ws.experiments.records import Records
from lora_ws.experiments.transfer.report import transfer_sections
from lora_ws.experiments.transfer.spec import (
    TransferKey,
    TransferRecord,
    TransferSpec,
    ZooRecord,
)
from lora_ws.experiments.transfer.zoos import Zoos, align, open_zoos, zoo_record
from lora_ws.learn.run import fit_shown
from lora_ws.learn.spec import ExperimentSpec
from lora_ws.models.base import is_invariant
from lora_ws.report.page import write_report

ZOOS = "zoos"


def run(spec: TransferSpec, options: Options) -> Path:
    """Build the zoos that are missing, measure what is not measured yet, and report.

    Returns:
        The folder of the report.

    Raises:
        ConfigError: there is no reader of a name asked for, or the folder holds another study.
        DataError: a zoo is of another recipe.
    """
    flags = options.flags
    readers = asked_for(spec.readers, flags.rows, "rows: there is no reader")
    records = Records(options.out, spec, TransferRecord)
    built = Records(options.out, spec, ZooRecord, f"{ZOOS}.jsonl")
    stores = open_zoos(spec, flags.zoos or options.out / ZOOS, flags.photos, flags.processes or 1)
    facts = built.complete(ZOOS, {n: partial(zoo_record, n, zoo) for n, zoo in stores.items()})
    families: dict[str, dict[str, AdapterSet]] = {}
    for name, zoo in stores.items():
        families.setdefault(spec.values[name].dataset, {})[name] = zoo
    aligned = {family: align(own) for family, own in families.items()}
    jobs: dict[TransferKey, Callable[[], TransferRecord]] = {}
    for reader in readers:
        recipe = load_spec(ExperimentSpec, recipe_file(reader.recipe))
        for trained in spec.trainings:
            zoos, folds = aligned[spec.values[trained[0]].dataset], spec.splits(trained[0])
            tested = readable(recipe, zoos, trained, spec.tested(trained))
            for fold in range(folds) if tested else ():
                key = TransferKey(reader.name, trained, fold)
                jobs[key] = partial(measure, key, recipe, zoos, tested, folds)
    done = records.complete(options.name, jobs)
    found = [done[key] for key in jobs]
    sections = transfer_sections(spec, found, list(facts.values()), options.out)
    write_report(options.out, f"{options.name}: {spec.title}", sections)
    return options.out


def readable(
    recipe: ExperimentSpec, zoos: Zoos, trained: tuple[str, ...], tested: tuple[str, ...]
) -> tuple[str, ...]:
    """Zoos that a reader can be tested on: one of raw weights reads no rank but that of training.

    Args:
        recipe: of the reader.
        zoos: all of them.
        trained: names of those that it is trained on; none can be tested if their ranks differ
            and it reads raw weights.
        tested: names of those to test on.
    """
    if is_invariant(recipe.featurizer) or is_invariant(recipe.model):
        return tested
    ranks = {zoos.rank(name) for name in trained}
    return tuple(name for name in tested if {zoos.rank(name)} == ranks)


def measure(
    key: TransferKey, recipe: ExperimentSpec, zoos: Zoos, tested: tuple[str, ...], folds: int
) -> TransferRecord:
    """Train a reader on one fold, and test it.

    Args:
        key: which reader, trained on what, and the fold; its number is the seed as well.
        recipe: of the reader.
        zoos: all of them.
        tested: names of those to test on.
        folds: how many there are.
    """
    split = zoos.fold(key.fold, folds)
    shown = zoos.taught(key.trained, tested, split, key.fold)
    test = fit_shown(replace(recipe, seeds=1), shown, key.fold).test
    right = np.asarray(test.scores.argmax(-1) == test.truth)
    rows = right.reshape(len(tested), len(split.test))
    hits = {
        name: "".join(map(str, own.astype(int))) for name, own in zip(tested, rows, strict=True)
    }
    return TransferRecord(*key, len(split.train), len(split.val), hits)
