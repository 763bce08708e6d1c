"""What the file of a study of transfer holds, and what the study keeps."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lora_ws.config import parse, to_plain
from lora_ws.errors import ConfigError
from lora_ws.experiments.kinds import EvalSpec
from lora_ws.experiments.recipes import recipe_file
from lora_ws.functional.perturb import Rounded
from lora_ws.zoo.spec import ZooSpec

RECIPE = "recipe"


@dataclass(frozen=True)
class ValueSpec:
    """One value of a factor: a zoo.

    Attributes:
        changes: dotted keys of the recipe of the zoo, and what they are instead.
        cast: type that the recipe's own adapters are rounded to; null trains adapters.
        dataset: a collection instead of a zoo of the recipe.
        subset: of the collection.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    cast: Rounded | None = None
    dataset: str = ""
    subset: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("changes", "cast", "dataset") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"{given[0]}: expected no {given[1]} beside it; leave one out")

    @property
    def zoo(self) -> str:
        """Name of its zoo: what differs from the recipe.

        Example:
            >>> ValueSpec({"finetune.rank": 4}).zoo, ValueSpec(cast="int8").zoo, ValueSpec().zoo
            ('rank=4', 'int8', 'recipe')
        """
        if self.dataset:
            return " ".join(filter(None, [self.dataset, self.subset]))
        if self.cast:
            return self.cast
        pairs = (f"{key.rpartition('.')[2]}={_text(v)}" for key, v in self.changes.items())
        return ",".join(pairs) or RECIPE


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class TransferReaderSpec:
    """A reader.

    Attributes:
        name: title.
        recipe: in `training/`.
    """

    name: str
    recipe: str


@dataclass(frozen=True)
class TransferSpec(EvalSpec):
    """A study of transfer.

    Attributes:
        zoo: recipe of the zoos, by name in `training/` or file.
        factors: factor -> its values by name: zoos of the recipe, of which one changes nothing, or
            subsets of one collection.
        readers: what is trained.
        folds: parts of the photo sets of zoos, each tested on once; a collection has its own parts.
    """

    zoo: str
    factors: dict[str, dict[str, ValueSpec]]
    readers: tuple[TransferReaderSpec, ...]
    folds: int = 5

    def __post_init__(self) -> None:
        for name, values in self.factors.items():
            zoos = [one.zoo for one in values.values()]
            built = not any(one.dataset for one in values.values())
            if len(zoos) < 2 or (built and RECIPE not in zoos):
                raise ConfigError(
                    f"factors.{name}: expected two values or more, one of them without changes, "
                    f"got {', '.join(values)}"
                )
            if len({one.dataset for one in values.values()}) > 1:
                raise ConfigError(
                    f"factors.{name}: expected zoos of one recipe or subsets of one collection, "
                    f"got both in {', '.join(values)}"
                )

    @property
    def cost(self) -> str:
        """Say what a run takes, for who is about to start one."""
        built = sum(not (one.dataset or one.cast) for one in self.values.values())
        trained = len(self.readers) * sum(self.splits(zoos[0]) for zoos in self.trainings)
        return (
            f"{built} zoos to build where they are missing, by {self.zoo} in training/, which says "
            f"what one takes; then {trained} readers to train, of seconds each"
        )

    @property
    def values(self) -> dict[str, ValueSpec]:
        """Every zoo by its name, the recipe first."""
        found = [one for values in self.factors.values() for one in values.values()]
        return {one.zoo: one for one in sorted(found, key=lambda one: one.zoo != RECIPE)}

    def zoos(self, factor: str) -> tuple[str, ...]:
        """Names of the zoos of a factor."""
        return tuple(one.zoo for one in self.factors[factor].values())

    def splits(self, zoo: str) -> int:
        """How often a reader is trained on a zoo: once for each fold, or for a collection's parts.

        Args:
            zoo: its name.
        """
        return 1 if self.values[zoo].dataset else self.folds

    def zoo_spec(self, name: str, out: Path, photos: str | None, processes: int) -> ZooSpec:
        """The recipe of a zoo.

        Args:
            name: of the zoo; one that is cast has no recipe of its own.
            out: folder of its store.
            photos: their source, instead of the recipe's.
            processes: that train at once.

        Raises:
            ConfigError: a change fits no key of the recipe.
        """
        flags = {"out": out, "processes": processes, **self.values[name].changes}
        flags |= {} if photos is None else {"photos.source": photos}
        words = [str(word) for key, value in flags.items() for word in (f"--{key}", _flag(value))]
        file = self.zoo if Path(self.zoo).is_file() else recipe_file(self.zoo)
        return parse(ZooSpec, ["--config", str(file), *words], prog=name)()

    @cached_property
    def trainings(self) -> tuple[tuple[str, ...], ...]:
        """What every reader is trained on: each zoo, all of a factor, and all but one of it."""
        found: list[tuple[str, ...]] = [(name,) for name in self.values]
        for factor in self.factors:
            names = self.zoos(factor)
            found.append(names)
            found += [tuple(n for n in names if n != name) for name in names]
        return tuple(dict.fromkeys(found))

    def tested(self, trained: tuple[str, ...]) -> tuple[str, ...]:
        """Zoos to test a reader on: those that share a factor with all that it was trained on.

        Args:
            trained: names of the zoos that it was trained on.
        """
        known = [self.zoos(f) for f in self.factors if set(trained) <= set(self.zoos(f))]
        return tuple(dict.fromkeys(name for names in known for name in names))


def _flag(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


class TransferKey(NamedTuple):
    """Tells records apart."""

    reader: str
    trained: tuple[str, ...]
    fold: int


@dataclass(frozen=True)
class TransferRecord:
    """A reader trained on one fold.

    Attributes:
        reader: its title.
        trained: names of the zoos; of several, each photo set is of one of them.
        fold: number of the fold that it was tested on.
        n_train: adapters that it was trained on.
        n_val: adapters that chose its epoch.
        hits: zoo -> 1 or 0 for each photo set of the fold: whether its class was named.
    """

    reader: str
    trained: tuple[str, ...]
    fold: int
    n_train: int
    n_val: int
    hits: dict[str, str]

    @property
    def key(self) -> TransferKey:
        """Tell it from all others."""
        return TransferKey(self.reader, tuple(self.trained), self.fold)


@dataclass(frozen=True)
class ZooRecord:
    """A zoo that readers were trained and tested on.

    Attributes:
        zoo: its name.
        adapters: how many it holds.
        version: hash of its content.
        rank: of the updates.
        loss: mean over adapters of the loss of the last epoch.
        norm_b: mean Frobenius norm of an adapter's B.
        seconds: that training an adapter took on average, beside whatever else ran.
    """

    zoo: str
    adapters: int
    version: str
    rank: int
    loss: float
    norm_b: float
    seconds: float

    @property
    def key(self) -> str:
        """Tell it from all others."""
        return self.zoo


def same_recipe(held: dict[str, Any], spec: ZooSpec) -> str:
    """What of a recipe differs from that of a zoo; empty where they agree.

    Where the photos come from, and how many adapters are trained at once, does not count.

    Args:
        held: recipe of the zoo, from its manifest.
        spec: the recipe asked for.

    Example:
        >>> same_recipe({"base": "tiny-sd"}, ZooSpec())
        'base: tiny-sd instead of digit-sd'
    """
    wanted, usual = to_plain(spec), to_plain(ZooSpec())
    for top in ("base", "seed", "finetune", "sampling"):
        if top not in held:
            continue
        # What recipes did not name yet when the zoo was built was as it is by default.
        found, asked = _parts(usual, top) | _parts(held, top), _parts(wanted, top)
        for key in found:
            if found[key] != asked.get(key):
                return f"{key}: {found[key]} instead of {asked.get(key)}"
    return ""


def _parts(recipe: dict[str, Any], top: str) -> dict[str, Any]:
    """A key of a recipe, or what it holds, such as ``finetune.steps``."""
    value = recipe[top]
    if not isinstance(value, dict):
        return {top: value}
    return {f"{top}.{name}": part for name, part in value.items()}
