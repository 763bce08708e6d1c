"""Records of experiments: one `RunRecord` per seed, in a JSON-lines file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ws import journal
from lora_ws.errors import DataError


@dataclass(frozen=True)
class RunRecord:
    """The outcome of one seed of one experiment.

    Attributes:
        name: the experiment.
        representation: class of the featurizer; its parameters are in the name and the config.
        dataset: name of the collection.
        subset: subset of it, or empty.
        data_version: hash of its content.
        layout: fingerprint of its layout.
        protocol: how data were split and the model chosen.
        engine: what trained it; equal seeds give equal records only within one engine.
        seed: of initialisation and shuffling.
        dim: length of the representation.
        classes: class names in the order of their labels; none in a regression.
        n_train: rows trained on.
        n_val: rows that chose the epoch.
        n_test: rows the metrics are measured on, once.
        epochs: epochs trained.
        best_epoch: epoch, counted from 1, whose weights were kept.
        val_loss: its validation loss.
        val: metrics on the validation rows: shares, and a mean absolute error in the label's unit.
        test: metrics on the test rows, alike.
        confusion: test rows by true class (row) and predicted class (column).
        seconds: time to fit and evaluate, or a share of it where models were fitted together;
            differs between equal runs.
        feature_seconds: time to make the features, once for all seeds.
        split: column that gave the parts, where it was not the collection's own rule.
        task: kind of label.
        refit: whether the network was fitted again on training and validation rows, ``n_train``
            of them, once ``val`` was measured.
        chosen: values that the validation rows chose, by key of the experiment.
        model: the network, with the parameters that are not defaults; those of an MLP are in the
            config.

    Example:
        >>> fields = dict(name="StatsLayer", representation="StatsLayer", dataset="lora-ws-mini")
        >>> fields |= dict(subset="shared/class", data_version="1", layout="7", protocol="clean")
        >>> fields |= dict(engine="lightning-cpu", seed=0, dim=896, classes=("fish", "tree"))
        >>> fields |= dict(n_train=7, n_val=1, n_test=2, epochs=9, best_epoch=4, val_loss=0.5)
        >>> measured = dict(val={}, test={"accuracy": 0.5}, confusion=((1, 0), (1, 0)))
        >>> record = RunRecord(**fields, **measured)
        >>> RunRecord.from_dict(record.to_dict()) == record
        True
    """

    name: str
    representation: str
    dataset: str
    subset: str
    data_version: str
    layout: str
    protocol: str
    engine: str
    seed: int
    dim: int
    classes: tuple[str, ...]
    n_train: int
    n_val: int
    n_test: int
    epochs: int
    best_epoch: int
    val_loss: float
    val: dict[str, float]
    test: dict[str, float]
    confusion: tuple[tuple[int, ...], ...]
    seconds: float = 0.0
    feature_seconds: float = 0.0
    split: str = ""
    task: str = "classification"
    model: str = "MLP"
    refit: bool = False
    chosen: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is usual goes without saying."""
        data = asdict(self)
        usual = {"task": "classification", "model": "MLP", "refit": False, "chosen": {}}
        return {k: v for k, v in data.items() if usual.get(k) != v or k not in usual}

    def timeless(self) -> dict[str, Any]:
        """All fields that equal runs share."""
        data = asdict(self)
        return {k: v for k, v in data.items() if k not in ("seconds", "feature_seconds")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunRecord":
        """Build from JSON; fields written by a later version are left out."""
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        values["classes"] = tuple(values["classes"])
        values["confusion"] = tuple(tuple(row) for row in values["confusion"])
        # Earlier versions told tasks apart by their classes.
        values.setdefault("task", "classification" if values["classes"] else "regression")
        return cls(**values)


class Summary(NamedTuple):
    """Mean and sample standard deviation over seeds, with every value kept."""

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarise values; one has no spread."""
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), std, tuple(values))

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    @property
    def percents(self) -> tuple[float, float]:
        """Mean and standard deviation in percent."""
        return 100 * self.mean, 100 * self.std

    def plain(self) -> str:
        """Text as it is; without a spread where there is one seed."""
        spread = f" ± {self.std:.3f}" if self.n > 1 else ""
        return f"{self.mean:.3f}{spread}"

    def percent(self) -> str:
        """Text in percent; without a spread where there is one seed."""
        spread = f" ± {100 * self.std:.1f}" if self.n > 1 else ""
        return f"{100 * self.mean:.1f}{spread}"


def read_records(path: Path) -> list[RunRecord]:
    """All complete lines; a line cut off by a kill does not count."""
    try:
        records = [RunRecord.from_dict(line) for line in journal.read(path)]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds records of another version of this library ({error}); choose another "
            "--out"
        ) from error
    return list({record.seed: record for record in records}.values())


def summarise(records: Sequence[RunRecord], metric: str, part: str = "test") -> Summary:
    """Mean ± std of a metric over the seeds.

    Raises:
        DataError: a record does not hold it.
    """
    values = [getattr(record, part).get(metric) for record in records]
    if None in values:
        lacking = records[values.index(None)]
        held = ", ".join(getattr(lacking, part)) or "none"
        raise DataError(f"{lacking.name}: expected records with {metric}, got {held}")
    return Summary.of(values)
