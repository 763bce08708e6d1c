"""The zoos of a study of transfer: built where they are missing, and brought side by side."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from lora_ws.collection import AdapterSet, Split, load
from lora_ws.collection.card import DatasetCard, SplitRule
from lora_ws.collection.splits import split_by_name, tied
from lora_ws.errors import DataError
from lora_ws.experiments.study.changes import CHANGES, changed_rows
from lora_ws.experiments.transfer.spec import RECIPE, TransferSpec, ZooRecord, same_recipe

LABEL, PART = "class", "part"


@dataclasses.dataclass(frozen=True, eq=False)
class Zoos:
    """Zoos of the same photo sets, row by row.

    Attributes:
        zoos: by name; row k of each was trained on the same photos.
        labels: class of each row.
        classes: their names.
        groups: of rows that share photos, which no two folds share.
    """

    zoos: Mapping[str, AdapterSet]
    labels: Int[np.ndarray, " sets"]
    classes: tuple[str, ...]
    groups: Int[np.ndarray, " sets"]

    def fold(self, k: int, folds: int) -> Split:
        """Photo sets to train on, to validate and to test, as ``fold-k-of-n`` splits them.

        One fold takes the collection's own parts.
        """
        if folds == 1:
            return next(iter(self.zoos.values())).split()
        return split_by_name(f"fold-{k}-of-{folds}", self.labels, self.groups)

    def rank(self, name: str) -> int:
        """Rank of the updates of a zoo."""
        return max(layer.rank for layer in self.zoos[name].layout.layers)

    def taught(
        self, trained: tuple[str, ...], tested: tuple[str, ...], split: Split, seed: int
    ) -> AdapterSet:
        """What a reader is trained on, and after it the test sets of each zoo, zoo by zoo.

        Ranks below the highest are padded with zeros. Of several zoos to train on, each photo set
        is of one, as many of each: the number of adapters is that of a single zoo.

        Args:
            trained: names of zoos to train and validate on.
            tested: names of zoos to test on.
            split: of the photo sets.
            seed: draws the zoo of each photo set.
        """
        kept = np.concatenate([split.train, split.val])
        source = np.random.default_rng(seed).permutation(np.arange(len(kept)) % len(trained))
        rank = max(map(self.rank, (*trained, *tested)))
        ready = {name: self.zoos[name].at_rank(rank) for name in {*trained, *tested}}
        chosen = [ready[trained[k]] for k in source]
        rows = [zoo.weights[row] for zoo, row in zip(chosen, kept, strict=True)]
        blocks = [np.stack(rows), *(ready[name].weights[split.test] for name in tested)]
        places = np.concatenate([kept, np.tile(split.test, len(tested))])
        parts = np.repeat(
            ["train", "val", "test"],
            [len(split.train), len(split.val), len(tested) * len(split.test)],
        )
        named = np.array(self.classes)[self.labels[places]]
        table = pa.table({LABEL: pa.array(named.tolist()), PART: pa.array(parts.tolist())})
        card = DatasetCard(
            name="transfer",
            label=LABEL,
            classes=self.classes,
            base_model=self.zoos[trained[0]].card.base_model,
            split=SplitRule(column=PART),
        )
        layout = ready[trained[0]].layout
        return AdapterSet(np.concatenate(blocks).astype(np.float32), layout, table, card)


def open_zoos(
    spec: TransferSpec, folder: Path, photos: str | None = None, processes: int = 1
) -> dict[str, AdapterSet]:
    """Open every zoo of a spec; those that are not there are built, or go on where they stopped.

    Args:
        spec: names them.
        folder: of their stores.
        photos: their source, instead of the recipe's.
        processes: that train adapters at once.

    Raises:
        DataError: a store in the folder is of another recipe.
    """
    found = dict[str, AdapterSet]()
    for name, value in spec.values.items():
        if value.cast:
            whole = found[RECIPE]
            rows, _ = changed_rows(
                np.asarray(whole.weights),
                whole.layout,
                CHANGES["cast"],
                value.cast,
                np.zeros(len(whole), np.int64),
                0,
            )
            found[name] = dataclasses.replace(whole, weights=rows)
            continue
        if value.dataset:
            whole = load(value.dataset)
            found[name] = whole.subset(value.subset) if value.subset else whole
            continue
        own = spec.zoo_spec(name, folder / name, photos, processes)
        if own.path.exists():
            found[name] = AdapterSet.open(own.path)
            if differs := same_recipe(found[name].manifest.get("recipe", {}), own):
                raise DataError(
                    f"{own.path} is a zoo of another recipe ({differs}); choose another --zoos"
                )
        else:
            # Here, because training adapters needs the `diffusion` extra.
            from lora_ws.zoo.build import build_zoo

            found[name] = build_zoo(own)
    return found


def align(zoos: Mapping[str, AdapterSet]) -> Zoos:
    """Bring zoos side by side: the photo sets that all have, in the order of the first.

    Raises:
        DataError: they have none in common.
    """
    places = {
        name: {tuple(sorted(set_)): k for k, set_ in enumerate(zoo.column("images"))}
        for name, zoo in zoos.items()
    }
    first = next(iter(zoos))
    common = [key for key in places[first] if all(key in own for own in places.values())]
    if not common:
        raise DataError(
            f"zoos {', '.join(zoos)}: expected photo sets that all were trained on, found none"
        )
    kept = {name: zoo.select([places[name][key] for key in common]) for name, zoo in zoos.items()}
    labels, classes = kept[first].labels()
    for name, zoo in kept.items():
        if not np.array_equal(zoo.labels()[0], labels):
            raise DataError(f"zoos {first}, {name}: expected one class for each photo set")
    return Zoos(kept, labels, classes, tied(kept[first].column("images")))


def zoo_record(name: str, zoo: AdapterSet) -> ZooRecord:
    """What a report says of a zoo.

    Args:
        name: of the zoo.
        zoo: as built, or a subset of a collection.
    """
    losses = [float(losses[-1]) for losses in zoo.column("epoch_loss")]
    return ZooRecord(
        name,
        len(zoo),
        zoo.version,
        max(layer.rank for layer in zoo.layout.layers),
        round(float(np.mean(losses)), 4),
        round(float(zoo.column("weight_norm_b").mean()), 4),
        round(float(zoo.column("duration_s").mean()), 3),
    )
