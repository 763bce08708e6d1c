"""`Bundle`: a trained classifier as tensors and JSON: no pickle, nothing that runs on loading.

A bundle is a folder with ``model.safetensors`` (network, fitted featurizer) and ``bundle.json``
(what they mean). It refuses weights of another layout, and abstains from what it does not know.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from lora_ws.adapters import Adapter, Layout
from lora_ws.adapters.bases import layout_base
from lora_ws.bundle.card import card_text
from lora_ws.bundle.confidence import (
    ROWS_AT_ONCE,
    Calibration,
    Confidence,
    NetworkOutputs,
    Prediction,
    Predictions,
    Reads,
    reads_by,
)
from lora_ws.bundle.formats import DAMAGE, read_files, under, write_files
from lora_ws.bundle.heads import Head, answers_of
from lora_ws.bundle.hub import fetch_bundle
from lora_ws.bundle.state import fitted_state, restore, restore_model
from lora_ws.config import to_plain
from lora_ws.errors import ConfigError, DataError, LayoutError, NotAvailableError, deprecated
from lora_ws.featurizers import Featurizer
from lora_ws.functional.rows import Rows
from lora_ws.hub import push_folder
from lora_ws.models.base import Metanetwork, is_invariant
from lora_ws.models.inputs import InputSpec

if TYPE_CHECKING:
    from lora_ws.models import MetanetModule

CARD = "README.md"
SPACE = ("centre", "scale", "directions")
# Higher ranks are cut to it even for a network that reads any, so that rows stay of a size.
MAX_RANK = 16


@dataclass(frozen=True, eq=False, repr=False)
class Bundle:
    """A classifier of adapters, ready to use.

    Attributes:
        featurizer: fitted.
        model: the network, as a spec.
        inputs: what the network knows about its rows.
        tensors: the network's state, by name.
        layout: the layout it reads.
        classes: what its outputs mean.
        training: the record of the run that made it.
        confidence: calibration and abstention; without calibration in bundles of format 1.
        revision: Hub commit it was read from, or empty.
        heads: what its further outputs mean, behind those of the classes.

    Example:
        >>> from lora_ws.bundle.hub import SHIPPED
        >>> bundle = Bundle.load(SHIPPED / "tiny-sd")
        >>> bundle.base, bundle.gauge, len(bundle.classes)
        ('tiny-sd', 'invariant', 10)
    """

    featurizer: Any
    model: Metanetwork
    inputs: InputSpec
    tensors: dict[str, np.ndarray]
    layout: Layout
    classes: tuple[str, ...]
    training: dict[str, Any]
    confidence: Confidence
    revision: str = ""
    heads: tuple[Head, ...] = ()

    def __repr__(self) -> str:
        shown = ", ".join(self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        said = "calibrated" if self.confidence.calibration else "not calibrated"
        return (
            f"Bundle({self.training.get('name', type(self.model).__name__)}: "
            f"{len(self.classes)} classes ({shown}), {len(self.layers)} layers of {self.base}, "
            f"{said})"
        )

    @property
    def gauge(self) -> Literal["raw", "invariant"]:
        """Whether it sees the same in ``B @ G, inv(G) @ A`` as in ``B, A``: the same update."""
        return "invariant" if any(map(is_invariant, (self.featurizer, self.model))) else "raw"

    @property
    def outputs(self) -> int:
        """Outputs of the network: a logit per class, then those of the heads."""
        return len(self.classes) + sum(head.outputs for head in self.heads)

    @cached_property
    def base(self) -> str:
        """The base model whose adapters it reads."""
        return layout_base(self.layout).name

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers that its features are made of; of other layers no byte is needed."""
        ours = isinstance(self.featurizer, Featurizer)
        patterns = getattr(self.featurizer, "matrices", None) if ours else None
        return tuple(dict.fromkeys(m.layer.name for m in self.layout.choose(patterns).matrices))

    @cached_property
    def any_rank(self) -> bool:
        """Whether its network reads updates of other ranks than the layout's as they are."""
        if self.model.reads != "factors" or not is_invariant(self.model):
            return False
        other = self.layout.at_rank(1 + max(layer.rank for layer in self.layout.layers))
        state = self._build(other).state_dict()
        return {n: v.shape for n, v in state.items()} == {
            n: v.shape for n, v in self.tensors.items()
        }

    def layout_for(self, adapter: Adapter) -> Layout:
        """The layout to bring an adapter into: the bundle's, or that at a higher rank.

        A network that reads any rank gets the adapter's own, up to 16.
        """
        ranks = [m.rank for name, m in adapter.linear.items() if name in self.layers]
        own = max(layer.rank for layer in self.layout.layers)
        rank = min(max(ranks, default=own), MAX_RANK)
        return self.layout.at_rank(rank) if rank > own and self.any_rank else self.layout

    @property
    def size_mb(self) -> float:
        """MiB of all its arrays."""
        arrays, _ = fitted_state(self.featurizer)
        held = [*arrays.values(), *self.tensors.values()]
        held += [getattr(self.confidence, name) for name in SPACE]
        return sum(array.nbytes for array in held) / 2**20

    def predict_proba(
        self, weights: Float[np.ndarray, "adapters params"], layout: Layout | None = None
    ) -> Float[np.ndarray, "adapters classes"]:
        """Probabilities of the classes, given that each adapter is of one of them, or of labels.

        They are calibrated on validation rows, unless the bundle is of format 1.

        Args:
            weights: rows in the bundle's layout.
            layout: the layout of the rows; checked against the bundle's.

        Raises:
            LayoutError: the rows are of another layout.
        """
        return self.predict_arrays(weights, layout).probabilities

    def predict_batch(
        self,
        weights: Float[np.ndarray, "adapters params"],
        layout: Layout | None = None,
        *,
        projected: bool | Sequence[bool] | np.ndarray = False,
    ) -> list[Prediction]:
        """Predict the class of each adapter, or abstain with a reason.

        Args:
            weights: rows in the bundle's layout.
            layout: the layout of the rows; checked against the bundle's.
            projected: whether the weights (all, or each row's) are not those of the file but
                factors of the nearest update that fits the layout. Their numbers are one choice of
                many, so a bundle with ``gauge == "raw"`` abstains.

        Raises:
            LayoutError: the rows are of another layout.
        """
        outputs = self._outputs(weights, layout)
        found = self._first(outputs)
        if self.gauge == "raw":
            found = found.abstain(np.asarray(projected, bool), "projected")
        predictions = found.per_adapter(self.classes, self.confidence.thresholds)
        further, silent = outputs.logits[:, len(self.classes) :], found.reasons != ""
        answers = answers_of(self.heads, further, silent)
        return [replace(p, answers=a) for p, a in zip(predictions, answers, strict=True)]

    def verdict(self, *args: Any, **keywords: Any) -> list[Prediction]:
        """Deprecated: `predict_batch`."""
        deprecated("Bundle.verdict", "Bundle.predict_batch")
        return self.predict_batch(*args, **keywords)

    def predict_arrays(
        self,
        weights: Float[np.ndarray, "adapters params"] | Rows,
        layout: Layout | None = None,
    ) -> Predictions:
        """Predict for many adapters: what `predict_batch` returns, as arrays.

        Args:
            weights: rows in the bundle's layout.
            layout: the layout of the rows; checked against the bundle's, whose ranks it may
                change where `any_rank`.

        Raises:
            LayoutError: the rows are of another layout.
        """
        return self._first(self._outputs(weights, layout))

    def _first(self, outputs: NetworkOutputs) -> Predictions:
        """Predict the classes; further outputs are those of heads."""
        own = outputs.logits[:, : len(self.classes)]
        return self.confidence.predict(outputs._replace(logits=own))

    def _outputs(self, weights: np.ndarray | Rows, layout: Layout | None) -> NetworkOutputs:
        """What the network makes of rows; NaN of those that are not finite."""
        layout = self.layout if layout is None else layout
        reads = self._reads_at(layout)
        outputs = [NetworkOutputs(np.empty((0, self.outputs)), np.empty(0), np.empty(0))]
        finite = np.ones(len(weights), bool)
        for start in range(0, len(weights), ROWS_AT_ONCE):
            block = slice(start, start + ROWS_AT_ONCE)
            rows, finite[block] = _without_nan(weights[block])
            features = np.array(self._features(rows, layout), np.float32)
            outputs.append(self.confidence.run(reads, features))
        whole = NetworkOutputs.join(outputs)
        whole.logits[~finite] = np.nan
        return whole

    def predict(self, adapter: Adapter) -> dict[str, float]:
        """Class probabilities of one adapter, the most probable first.

        They are given also where `predict_batch` abstains.
        """
        return self.predict_batch(adapter.flat()[None], adapter.layout)[0].probabilities

    def save(self, folder: str | Path) -> Path:
        """Write the bundle; an older one in the folder is replaced."""
        folder = Path(folder)
        arrays, values = fitted_state(self.featurizer)
        tensors = {f"model.{name}": value for name, value in self.tensors.items()}
        tensors |= {f"featurizer.{name}": value for name, value in arrays.items()}
        tensors |= {f"confidence.{name}": getattr(self.confidence, name) for name in SPACE}
        calibration = self.confidence.calibration
        info = {
            "classes": self.classes,
            "model": to_plain(self.model),
            "width": self.inputs.width,
            "featurizer": {**to_plain(self.featurizer), "fitted": values},
            "fingerprint": self.layout.fingerprint,
            "layout": self.layout.to_dict(),
            "gauge": self.gauge,
            "calibration": calibration and asdict(calibration),
            "thresholds": self.confidence.thresholds,
            "heads": [asdict(head) for head in self.heads],
            "training": self.training,
        }
        write_files(folder, info, tensors)
        (folder / CARD).write_text(self.model_card(), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, allow_classes: tuple[str, ...] = ()) -> "Bundle":
        """Read a bundle.

        Args:
            folder: where it is.
            allow_classes: dotted paths of featurizers and networks outside this library that it
                may name.

        Raises:
            NotAvailableError: there is no bundle.
            DataError: it is damaged, of a later format, or its hash does not match.
            ConfigError: it names a class that is not allowed.
        """
        folder = Path(folder)
        try:
            info, tensors = read_files(folder)
            layout, held = Layout.from_dict(info["layout"]), info["calibration"]
            featurizer = restore(info["featurizer"], tensors, layout, allow_classes)
            model = restore_model(info["model"], allow_classes)
            bundle = cls(
                featurizer,
                model,
                _inputs(model, featurizer, layout, info["width"]),
                under("model.", tensors),
                layout,
                tuple(info["classes"]),
                info["training"],
                Confidence(
                    **under("confidence.", tensors),
                    calibration=Calibration(**held) if held else None,
                    thresholds=tuple(info["thresholds"]),
                ),
                heads=tuple(map(Head.from_dict, info["heads"])),
            )
            bundle.check()
        except DAMAGE as error:
            if isinstance(error, DataError | ConfigError | NotAvailableError):
                raise
            raise DataError(f"{folder}: damaged bundle ({error!r})") from error
        return bundle

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        allow_classes: tuple[str, ...] = (),
    ) -> "Bundle":
        """Load from a folder or a Hub repository; `revision` of the result is the commit read."""
        if Path(name_or_path).is_dir():
            return cls.load(name_or_path, allow_classes=allow_classes)
        folder, commit = fetch_bundle(str(name_or_path), revision)
        bundle = cls.load(folder, allow_classes=allow_classes)
        return replace(bundle, revision=commit)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the bundle with a model card; returns the commit to pin."""
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save(folder)
            (saved / CARD).write_text(self.model_card(repo_id), encoding="utf-8")
            return push_folder(saved, repo_id, "Upload lora_ws bundle", private=private)

    def model_card(self, repo_id: str = "...") -> str:
        """The README of the bundle, whose head is the metadata that the Hub reads.

        Args:
            repo_id: where it will be found.
        """
        return card_text(
            self.training,
            self.classes,
            self.layout,
            self.confidence,
            heads=self.heads,
            gauge=self.gauge,
            size_mb=self.size_mb,
            repo_id=repo_id,
        )

    @cached_property
    def network(self) -> "MetanetModule":
        """The network in torch, built from its spec and filled with its state."""
        return self._filled(self.model.build(self.inputs, self.outputs))

    @cached_property
    def _reads(self) -> dict[str, Reads]:
        """What reads rows, by the fingerprints of the layouts that it was asked to read."""
        score = self.model.in_numpy(self.inputs, self.outputs, self.tensors)
        if score is None:
            return {self.layout.fingerprint: reads_by(self.network)}
        return {self.layout.fingerprint: lambda rows: (rows, score(rows))}

    def _reads_at(self, layout: Layout) -> Reads:
        """What reads the bundle's layout, or that at other ranks where it reads any."""
        if layout.fingerprint not in self._reads:
            if layout.at_rank(1) != self.layout.at_rank(1) or not self.any_rank:
                raise LayoutError(
                    "this bundle reads another kind of adapter: "
                    + (self.layout.difference(layout) or "the layouts differ")
                )
            self._reads[layout.fingerprint] = reads_by(self._filled(self._build(layout)))
        return self._reads[layout.fingerprint]

    def _filled(self, network: "MetanetModule") -> "MetanetModule":
        import torch

        network.load_state_dict({n: torch.from_numpy(v) for n, v in self.tensors.items()})
        return network.eval()

    def _build(self, layout: Layout) -> "MetanetModule":
        read = layout.choose(getattr(self.featurizer, "matrices", None)).layout
        return self.model.build(InputSpec.of(read), self.outputs)

    def _features(self, rows: np.ndarray, layout: Layout) -> np.ndarray:
        if layout == self.layout:
            return self.featurizer.transform(rows)
        return rows[:, layout.choose(getattr(self.featurizer, "matrices", None)).columns]

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            ValueError: embeddings or outputs are of another width than the classes and directions.
            RuntimeError: the network is not that of the tensors.
        """
        empty = np.zeros((1, self.inputs.width), np.float32)
        embedding, outputs = self._reads_at(self.layout)(empty)
        width, classes = embedding.shape[1], len(self.classes)
        found = [getattr(self.confidence, name).shape for name in SPACE]
        if found != [(width,), (width,), (classes, width)] or outputs.shape[1] != self.outputs:
            raise ValueError(f"outputs of shape {tuple(outputs.shape)}, confidence of {found}")


def _inputs(model: Metanetwork, featurizer: Any, layout: Layout, width: int) -> InputSpec:
    if model.reads == "features":
        return InputSpec(width)
    return InputSpec.of(layout.choose(getattr(featurizer, "matrices", None)).layout)


def _without_nan(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with zeros in place of those that hold NaN or infinity, and which do not."""
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    return (rows if finite.all() else np.where(finite[:, None], rows, 0)), finite
