"""`ExperimentSpec`: everything that decides a result, as plain data.

Its fields are the keys of the YAML files in `training/` and the flags of `lora-ws train`.
"""

import inspect
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import sklearn.kernel_ridge  # noqa: F401  loaded classes are found by their short names
import sklearn.linear_model  # noqa: F401
import sklearn.neighbors  # noqa: F401
import sklearn.svm  # noqa: F401
import yaml
from sklearn.base import BaseEstimator, TransformerMixin, clone, is_classifier, is_regressor
from sklearn.utils import get_tags

from lora_ws.collection.card import card_names, find_card
from lora_ws.config import DEPRECATED, load_spec, to_plain
from lora_ws.errors import ConfigError, deprecated
from lora_ws.featurizers import PAPER, Featurizer, FlatVec, UpdateKernel
from lora_ws.learn.augment import Augmentation, Mixup
from lora_ws.learn.choose import candidates
from lora_ws.learn.tasks import TASKS, MultiLabel, Task, task_of
from lora_ws.learn.trainer_spec import TrainerSpec
from lora_ws.models import *  # noqa: F403  loaded networks are found by their names
from lora_ws.models import MLP, Metanetwork
from lora_ws.models.gaussian_process import GaussianProcess  # noqa: F401  found by its name
from lora_ws.models.one_vs_rest import OneVsRestSVC  # noqa: F401


@dataclass(frozen=True)
class FitSpec:
    """How a network is fitted (defaults: paper section 5.1).

    Attributes:
        optimizer: Adam, or AdamW with decoupled weight decay.
        lr: learning rate.
        weight_decay: weight decay of the optimizer.
        batch_size: adapters per step.
        max_epochs: maximal number of epochs.
        patience: epochs without a lower validation loss before training stops.
        schedule: learning rate schedule: reduced on plateaus of the validation loss, cosine decay
            to 0 at max_epochs, or constant.
        lr_factor: factor by which the learning rate is reduced on a plateau.
        lr_patience: epochs without a lower validation loss before the learning rate is reduced.
        warmup: epochs of linear learning rate warmup.
        grad_clip: maximal gradient norm; null does not clip.
        ema: decay per step of an exponential moving average of the weights, which replaces the
            weights; null uses none.
        weights: weights to evaluate: those of the epoch with the lowest validation loss, or the
            last ones, as in the published scripts.
        hidden: deprecated, use ``model: MLP`` with ``hidden``.
    """

    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 32
    max_epochs: int = 2000
    patience: int = 20
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    lr_factor: float = 0.5
    lr_patience: int = 5
    warmup: float = 0.0
    grad_clip: float | None = None
    ema: float | None = None
    weights: Literal["best", "last"] = "best"
    hidden: tuple[int, ...] | None = field(default=None, metadata=DEPRECATED)

    def __post_init__(self) -> None:
        for name in ("lr", "batch_size", "max_epochs", "patience"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"fit.{name}: expected above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise ConfigError(f"fit.{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 < self.lr_factor < 1:
            raise ConfigError(f"fit.lr_factor: expected between 0 and 1, got {self.lr_factor}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"fit.ema: expected between 0 and 1, or null, got {self.ema}")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ConfigError(f"fit.grad_clip: expected above 0, or null, got {self.grad_clip}")

    @property
    def changed(self) -> tuple[str, ...]:
        """Settings that the batched engine does not have."""
        plain = FitSpec()
        return tuple(n for n in ("ema", "weights") if getattr(self, n) != getattr(plain, n))


@dataclass(frozen=True)
class ExperimentSpec:
    """Train networks on the weights of adapters, with several seeds, and report.

    Attributes:
        dataset: a collection's name, or the folder of a store, also at an address.
        subset: subset of the collection; null takes the card's first. `lora-ws train` takes the
            card's main one, and ``all`` runs each.
        split: column with each row's part (train, val or test), such as ``leaf_part`` of
            lora-ws-mini, whose parts share no leaf class; or a rule by name: ``group:leaf`` (parts
            share no leaf class; any column of the rows), ``fold-0-of-5``, ``published-70-10-20``,
            ``published-80-20``; null takes the card's rule.
        revision: Hub revision instead of the card's.
        label: column to predict, or several of 0 and 1 separated by commas for multilabel; null
            takes the card's.
        task: what to predict, by name (classification, multilabel, regression,
            embedding, zero_shot, multitask; see docs/tasks.md), or a task by class name or dotted
            path, with parameters.
        matrices: names of the layers or matrices to read, with ``*`` as a wildcard (see
            `Layout.choose`); null reads all.
        featurizer: the representation, by class name or dotted path; null takes the weights
            themselves for a network that reads factors, UpdateKernel for a classifier of a
            precomputed kernel, and else the paper's five, one after the other (`train` alone).
        model: the network, by class name or dotted path, or a scikit-learn classifier or regressor:
            SVC, OneVsRestSVC, KernelRidge, GaussianProcess, LogisticRegression and others by name,
            any by its dotted path. A regressor predicts classes by least squares on 1 and -1.
        augment: augmentations of the training rows, by class name, such as FactorNoise, each with a
            probability; for networks that read factors.
        choose: candidate values by dotted key, such as ``model.C`` or ``featurizer.whiten``; all
            combinations are fitted, and the validation rows select the best.
        refit: after selection on the validation rows, fit on training and validation rows together;
            calibration then uses out-of-fold outputs. For scikit-learn estimators only.
        metadata: a control: predict from these columns of the table instead of weights.
        shuffle_labels: a control: shuffle the labels, with a new order per seed.
        first_rows: use only the first n rows of each part; null uses all.
        protocol: protocol of the experiment, a label in records and tables.
        fit: how the network is fitted.
        trainer: devices, engine and logging.
        seeds: number of seeds, from 0 up; the paper reports 10.
        out: folder of the run; null makes one below runs/. An interrupted run resumes.
        regression: deprecated, use ``task: regression``.

    Example:
        >>> from lora_ws import StatsLayer
        >>> spec = ExperimentSpec(subset="shared/class", featurizer=StatsLayer(), seeds=2)
        >>> spec.model.hidden
        (512, 512, 512)
    """

    dataset: str = "lora-ws-mini"
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    label: str | None = None
    task: Task | str = "classification"
    matrices: tuple[str, ...] | None = None
    featurizer: Featurizer | TransformerMixin | None = None
    model: Metanetwork | BaseEstimator = field(default_factory=MLP)
    augment: tuple[Augmentation, ...] = ()
    choose: dict[str, list[Any]] = field(default_factory=dict)
    refit: bool = False
    metadata: tuple[str, ...] = ()
    shuffle_labels: bool = False
    first_rows: int | None = None
    protocol: Literal["clean", "paper", "as-run"] = "clean"
    fit: FitSpec = field(default_factory=FitSpec)
    trainer: TrainerSpec = field(default_factory=TrainerSpec)
    seeds: int = 3
    out: Path | None = None
    regression: bool | None = field(default=None, metadata=DEPRECATED)

    def __post_init__(self) -> None:
        self._take_deprecated()
        for name in ("seeds", "first_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if isinstance(self.task, str) and self.task not in TASKS:
            raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {self.task}")
        if self.kind.needs_label and self.label is None and not self._card_serves:
            raise ConfigError(
                f"task={self.kind.name}: expected `label`, {self.kind.needs_label}, got none"
            )
        if self.metadata and self.featurizer is not None:
            raise ConfigError(
                f"metadata: expected no featurizer beside it, got {describe(self.featurizer)}"
            )
        self._check_model()
        self._check_mixup()
        if self.featurizer is None and not self.metadata and self._takes_kernel:
            object.__setattr__(self, "featurizer", UpdateKernel())
        if self.matrices is not None and not self.takes_matrices:
            given = "metadata" if self.metadata else describe(self.featurizer)
            raise ConfigError(
                f"matrices: expected a featurizer that takes `matrices`, got {given}; use FlatVec, "
                "say"
            )
        if self.choose:
            candidates(self)
        if self.refit and isinstance(self.model, Metanetwork):
            raise ConfigError(
                f"refit: expected a classifier or regressor of scikit-learn, got "
                f"{describe(self.model)}, which needs validation rows to stop; leave it out"
            )
        self._check_trainer()

    @property
    def _card_serves(self) -> bool:
        """Whether the label of the collection's card is one for this task, as far as known."""
        known = str(self.dataset) in card_names()
        return not known or find_card(str(self.dataset)).task == self.kind.name

    def _check_model(self) -> None:
        """Refuse what no engine fits; a network that reads factors gets the weights themselves."""
        model, kind = self.model, self.kind
        if not isinstance(model, Metanetwork):
            if not (is_classifier(model) or is_regressor(model)):
                raise ConfigError(
                    f"model: expected a network, or a classifier or regressor of scikit-learn, got "
                    f"{describe(model)}; use MLP, say"
                )
            word = "regressor" if is_regressor(model) else "classifier"
            if not getattr(kind, f"takes_{word}s"):
                other = " or a regressor" if kind.takes_regressors else ""
                raise ConfigError(
                    f"model: expected a network{other} for task={kind.name}, got "
                    f"{describe(model)}, a {word}; use MLP, say"
                )
        if not self.reads_factors:
            if self.augment:
                raise ConfigError(
                    f"augment: expected a network that reads factors, got {describe(self.model)}; "
                    "leave it out, or use DeepSets, say"
                )
            return
        if self.metadata or not isinstance(self.featurizer, FlatVec | None):
            given = "metadata" if self.metadata else f"featurizer {describe(self.featurizer)}"
            raise ConfigError(
                f"model: {describe(self.model)} reads the factors themselves, got {given}; "
                "leave it out, or choose a network that reads features, such as MLP"
            )
        if self.featurizer is None:
            object.__setattr__(self, "featurizer", FlatVec())

    @property
    def _takes_kernel(self) -> bool:
        """Whether the model is a classifier of a kernel that is computed before."""
        plain = isinstance(self.model, Metanetwork)
        return not plain and bool(get_tags(self.model).input_tags.pairwise)

    def _check_mixup(self) -> None:
        if not self.kind.by_row and any(isinstance(one, Mixup) for one in self.augment):
            raise ConfigError(
                f"augment: expected no Mixup with task={self.kind.name}, whose loss of a row hangs "
                "on the others; leave it out"
            )

    def _check_trainer(self) -> None:
        """Refuse what several devices or the batched engine cannot do."""
        if self._undivided and self.trainer.world > 1:
            raise ConfigError(
                f"trainer.devices x trainer.num_nodes: expected 1 with {self._undivided}, got "
                f"{self.trainer.world}; leave one of them out"
            )
        if self.trainer.engine == "batched" and self.unbatched:
            raise ConfigError(
                f"trainer.engine: expected auto or one-by-one with {self.unbatched}, got batched"
            )

    @property
    def unbatched(self) -> str:
        """The setting that the batched engine does not have; empty where it has all."""
        if self.fit.changed:
            name = self.fit.changed[0]
            return f"fit.{name}={getattr(self.fit, name)}"
        if self.augment:
            return f"augment {describe(self.augment[0])}"
        return self._undivided

    @property
    def _undivided(self) -> str:
        """The setting that neither devices nor a stack share; empty where there is none."""
        if self.choose:
            return "choose"
        return "" if isinstance(self.model, Metanetwork) else f"model {describe(self.model)}"

    def _take_deprecated(self) -> None:
        """Translate what earlier versions wrote."""
        if self.fit.hidden is not None:
            deprecated("fit.hidden", "model: MLP with hidden")
            object.__setattr__(self, "model", MLP(hidden=tuple(self.fit.hidden)))
            object.__setattr__(self, "fit", replace(self.fit, hidden=None))
        if isinstance(self.task, MultiLabel) and self.task.columns:
            deprecated("task.columns", f"label: {','.join(self.task.columns)}")
            object.__setattr__(self, "label", ",".join(self.task.columns))
            object.__setattr__(self, "task", MultiLabel(pos_weight=self.task.pos_weight))
        if self.regression is not None:
            deprecated("regression", "task: regression")
            object.__setattr__(self, "task", "regression" if self.regression else self.task)
            object.__setattr__(self, "regression", None)

    @property
    def name(self) -> str:
        """Representation and network, each with the parameters that are not defaults.

        The paper's network goes without saying: ``FlatVecPCA(n_components=50)``, but
        ``FlatVec > DeepSets(width=32)``.
        """
        if self.metadata:
            read = f"metadata({', '.join(self.metadata)})"
        else:
            read = describe(self.representation) if self.representation is not None else "paper"
        return read if isinstance(self.model, MLP) else f"{read} > {describe(self.model)}"

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return slug(self.name)

    @property
    def reads_factors(self) -> bool:
        """Whether the network reads the factors, not features made of them."""
        return isinstance(self.model, Metanetwork) and self.model.reads == "factors"

    @property
    def kind(self) -> Task:
        """The task, before it knows any targets."""
        return task_of(self.task)

    @property
    def representation(self) -> Featurizer | TransformerMixin | None:
        """The featurizer, limited to the matrices that are to be read."""
        if self.matrices is None or self.featurizer is None:
            return self.featurizer
        copy: Any = clone(self.featurizer)
        return copy.set_params(matrices=self.matrices)

    @property
    def takes_matrices(self) -> bool:
        """Whether it can be limited to some matrices."""
        featurizer: Any = self.featurizer
        if featurizer is None:
            return not self.metadata
        return "matrices" in featurizer.get_params(deep=False)

    def vary(self, **parameters: object) -> "ExperimentSpec":
        """The same experiment with other parameters of its representation."""
        copy: Any = clone(self.featurizer)
        return replace(self, featurizer=copy.set_params(**parameters))

    def check_single(self) -> None:
        """Refuse to stand for several experiments.

        Raises:
            ConfigError: no representation is named, which stands for the paper's five.

        Example:
            >>> ExperimentSpec(featurizer=FlatVec()).check_single()
        """
        if self.featurizer is None and not self.metadata:
            raise ConfigError(
                "featurizer: expected one representation, got none; name one, such as FlatVec"
            )

    def rows(self) -> list["ExperimentSpec"]:
        """One spec per representation: itself, or the paper's five."""
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


def read_identity(file: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The identity of the experiment that a folder holds.

    Args:
        file: its ``config.yaml``.
        now: an identity of this version; a file of an earlier one is translated.
    """
    held = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if set(held) >= set(now) and set(held["fit"]) == set(now["fit"]):
        return held
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return identity(load_spec(ExperimentSpec, file))


def describe(estimator: Any) -> str:
    """Class name and changed parameters, such as ``FlatVecPCA(n_components=50)``."""
    given = to_plain(estimator)["init_args"]
    parameters = inspect.signature(type(estimator)).parameters
    default = {name: to_plain(p.default) for name, p in parameters.items()}
    changed = ", ".join(f"{k}={v}" for k, v in given.items() if v != default.get(k))
    return type(estimator).__name__ + (f"({changed})" if changed else "")
