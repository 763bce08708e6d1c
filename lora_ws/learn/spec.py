"""`ExperimentSpec`: everything that decides a result, as plain data.

Its fields are the keys of the YAML files in `training/` and the flags of `lora-ws train`.
"""

import inspect
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sklearn.base import TransformerMixin, clone

from lora_ws.config import to_plain
from lora_ws.errors import ConfigError
from lora_ws.featurizers import PAPER


@dataclass(frozen=True)
class FitSpec:
    """The classifier and how it is fitted (defaults: paper section 5.1).

    Attributes:
        hidden: widths of the hidden layers; the paper's harmful-content classifier has 1024 each.
        lr: learning rate of Adam.
        batch_size: adapters a step.
        max_epochs: upper bound on epochs.
        patience: epochs without a lower validation loss after which training stops.
        lr_factor: factor on the learning rate at a plateau of the validation loss.
        lr_patience: epochs that make a plateau.
        weights: which epoch's weights are measured: those of the lowest validation loss, or the
            last ones, as the published scripts do.
    """

    hidden: tuple[int, ...] = (512, 512, 512)
    lr: float = 1e-3
    batch_size: int = 32
    max_epochs: int = 2000
    patience: int = 20
    lr_factor: float = 0.5
    lr_patience: int = 5
    weights: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigError(f"fit.hidden: expected positive widths, got {self.hidden}")
        for name in ("lr", "batch_size", "max_epochs", "patience"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"fit.{name}: expected above 0, got {getattr(self, name)}")
        if not 0 < self.lr_factor < 1:
            raise ConfigError(f"fit.lr_factor: expected between 0 and 1, got {self.lr_factor}")


@dataclass(frozen=True)
class TrainerSpec:
    """Where training runs, and what is logged.

    Attributes:
        accelerator: Lightning's accelerator; auto takes a GPU where there is one.
        devices: how many of them on each node, a process each.
        num_nodes: how many machines.
        strategy: ddp shares every batch among the devices; auto does so where there are several.
        checkpoint_every: epochs between checkpoints, from which a seed that was cut off goes on;
            0 for none, null for 10 on several devices and none on one.
        threads: CPU threads of one process; small networks lose by more than one.
        wandb: log to Weights & Biases too; "offline" writes to the run folder only.
        engine: ``one-by-one`` trains a seed after another with Lightning, ``batched`` all seeds in
            one stack; auto takes batched on a CUDA device, unless wandb is asked for.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    checkpoint_every: int | None = None
    threads: int = 1
    wandb: Literal["off", "offline", "online"] = "off"
    engine: Literal["auto", "one-by-one", "batched"] = "auto"

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}: expected at least 1, got {getattr(self, name)}")
        if self.strategy == "ddp" and self.world == 1:
            raise ConfigError(
                "trainer.strategy: expected several devices for `ddp`, got 1; set trainer.devices "
                "or trainer.num_nodes, or use auto"
            )
        if self.checkpoint_every is not None and self.checkpoint_every < 0:
            raise ConfigError(
                f"trainer.checkpoint_every: expected 0 or more, got {self.checkpoint_every}; "
                "0 writes no checkpoints"
            )
        if self.engine == "batched" and (self.wandb != "off" or self.world != 1):
            raise ConfigError(
                "trainer.engine: expected auto or one-by-one with trainer.wandb or several "
                "devices, got batched; leave one of them out"
            )

    @property
    def world(self) -> int:
        """Processes of a run: one a device."""
        return self.devices * self.num_nodes

    @property
    def epochs_to_checkpoint(self) -> int:
        """Epochs between checkpoints, 0 for none."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every
        return 10 if self.world > 1 else 0


@dataclass(frozen=True)
class ExperimentSpec:
    """Train classifiers on the weights of adapters, with several seeds, and report.

    Attributes:
        dataset: a collection's name, or the folder of a store.
        subset: a subset of it; null takes the card's first, and `lora-ws train` each.
        split: column that records each row's part (train, val or test), such as ``leaf_part`` of
            lora-ws-mini, whose parts share no leaf class; or a rule by name: ``fold-0-of-5``,
            ``published-70-10-20``, ``published-80-20``; null takes the card's rule.
        revision: Hub revision instead of the card's.
        label: column to predict; null takes the card's.
        regression: take the label as a number and fit it by squared error.
        featurizer: the representation, by class name or dotted path; null takes the paper's five.
        metadata: a control: represent adapters by these columns of the table, not by weights.
        shuffle_labels: a control: give the rows each other's labels, anew for every seed.
        first_rows: use only so many rows of each part, the first ones.
        protocol: how the experiment was set up; a label that records and tables repeat.
        fit: the classifier.
        trainer: where it runs.
        seeds: how many, from 0 up; the paper reports 10.
        out: folder of the run; null makes one below runs/. A run that was cut off continues.
    """

    dataset: str = "lora-ws-mini"
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    label: str | None = None
    regression: bool = False
    featurizer: TransformerMixin | None = None
    metadata: tuple[str, ...] = ()
    shuffle_labels: bool = False
    first_rows: int | None = None
    protocol: Literal["clean", "paper", "as-run"] = "clean"
    fit: FitSpec = field(default_factory=FitSpec)
    trainer: TrainerSpec = field(default_factory=TrainerSpec)
    seeds: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds: expected at least 1, got {self.seeds}")
        if self.first_rows is not None and self.first_rows < 1:
            raise ConfigError(f"first_rows: expected at least 1, got {self.first_rows}")
        if self.trainer.engine == "batched" and self.fit.weights == "last":
            raise ConfigError(
                "trainer.engine: expected auto or one-by-one with fit.weights=last, got batched"
            )
        if self.regression and self.label is None:
            raise ConfigError("regression: expected `label`, a column of numbers, got none")
        if self.regression and self.trainer.engine == "batched":
            raise ConfigError(
                "trainer.engine: expected auto or one-by-one with regression, got batched"
            )
        if self.metadata and self.featurizer is not None:
            raise ConfigError(
                f"metadata: expected no featurizer beside it, got {describe(self.featurizer)}"
            )

    @property
    def name(self) -> str:
        """The representation with the parameters that are not defaults."""
        if self.metadata:
            return f"metadata({', '.join(self.metadata)})"
        return describe(self.featurizer) if self.featurizer is not None else "paper"

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return slug(self.name)

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the representation; none where there is no single one."""
        featurizer: Any = self.featurizer
        return {} if featurizer is None else featurizer.get_params(deep=False)

    def vary(self, **parameters: object) -> "ExperimentSpec":
        """The same experiment with other parameters of its representation."""
        copy: Any = clone(self.featurizer)
        return replace(self, featurizer=copy.set_params(**parameters))

    def rows(self) -> list["ExperimentSpec"]:
        """One spec a representation: itself, or the paper's five."""
        if self.featurizer is not None or self.metadata:
            return [self]
        return [replace(self, featurizer=featurizer()) for featurizer in PAPER]


def slug(name: str) -> str:
    """A name as a folder or file."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-")


def identity(spec: ExperimentSpec) -> dict[str, Any]:
    """What makes two specs the same experiment; more seeds are the same one, continued."""
    plain = to_plain(spec)
    return {k: v for k, v in plain.items() if k not in ("out", "seeds", "trainer")}


def describe(featurizer: TransformerMixin) -> str:
    """Class name and changed parameters, such as ``FlatVecPCA(n_components=50)``."""
    given = to_plain(featurizer)["init_args"]
    parameters = inspect.signature(type(featurizer)).parameters
    default = {name: to_plain(p.default) for name, p in parameters.items()}
    changed = ", ".join(f"{k}={v}" for k, v in given.items() if v != default.get(k))
    return type(featurizer).__name__ + (f"({changed})" if changed else "")
