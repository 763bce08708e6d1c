"""`Bundle`: a trained classifier as tensors and JSON: no pickle, nothing that runs on loading.

A bundle is a folder with ``model.safetensors`` (network, scaler, fitted featurizer) and
``bundle.json`` (what they mean). It refuses weights of another layout, and abstains from what it
does not know.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_ws.adapters import Adapter, Layout
from lora_ws.adapters.bases import layout_base
from lora_ws.adapters.source import file_sha256
from lora_ws.config import to_plain
from lora_ws.errors import ConfigError, DataError, LayoutError, NotAvailableError
from lora_ws.featurizers import Featurizer
from lora_ws.hub import push_folder
from lora_ws.learn.card import card_text
from lora_ws.learn.confidence import (
    ROWS_AT_ONCE,
    Calibration,
    Confidence,
    Judged,
    Seen,
    Verdict,
    fit_confidence,
)
from lora_ws.learn.hub import fetch_bundle
from lora_ws.learn.state import fitted_state, restore
from lora_ws.models import MLP
from lora_ws.report.records import RunRecord

if TYPE_CHECKING:
    from lora_ws.learn.features import Prepared
    from lora_ws.learn.module import LoraModule

MODEL, INFO, CARD = "model.safetensors", "bundle.json", "README.md"
DIRECTIONS = "confidence.directions"
FORMAT = 2
DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    OSError,
    RuntimeError,
    SafetensorError,
)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A classifier of adapters, ready to use.

    Attributes:
        featurizer: fitted.
        tensors: network and scaler, by name.
        layout: the layout it reads.
        classes: what its outputs mean.
        hidden: widths of the network's hidden layers.
        training: the record of the run that made it.
        confidence: calibration and abstention; without calibration in bundles of format 1.
        revision: Hub commit it was read from, or empty.
    """

    featurizer: Any
    tensors: dict[str, np.ndarray]
    layout: Layout
    classes: tuple[str, ...]
    hidden: tuple[int, ...]
    training: dict[str, Any]
    confidence: Confidence
    revision: str = ""

    @classmethod
    def build(
        cls,
        prepared: "Prepared",
        module: "LoraModule",
        record: RunRecord,
        confidence: Confidence | None = None,
    ) -> "Bundle":
        """Take what a finished seed needs to be used again.

        Args:
            prepared: the data that the seed saw.
            module: its network, on the CPU.
            record: its outcome.
            confidence: fitted already on the same seed; None fits it.

        Raises:
            ConfigError: it does not read weights, or has no classes.
        """
        if not prepared.classes:
            raise ConfigError("a bundle names classes; a regression has none")
        if prepared.featurizer is None:
            raise ConfigError("a classifier of metadata reads no weights; nothing to bundle")
        model = {k: v.detach().cpu().numpy() for k, v in module.model.state_dict().items()}
        return cls(
            featurizer=prepared.featurizer,
            tensors={
                **{f"model.{name}": value for name, value in model.items()},
                "scaler.mean": prepared.mean,
                "scaler.scale": prepared.scale,
            },
            layout=prepared.zoo.layout,
            classes=prepared.classes,
            hidden=module.fit_spec.hidden,
            training=asdict(record),
            confidence=confidence or fit_confidence(prepared, module).confidence,
        )

    @property
    def gauge(self) -> Literal["raw", "invariant"]:
        """Whether it sees the same in ``B @ G, inv(G) @ A`` as in ``B, A``: the same update."""
        return "invariant" if getattr(self.featurizer, "invariant", False) else "raw"

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

    @property
    def size_mb(self) -> float:
        """MiB of all its arrays."""
        arrays, _ = fitted_state(self.featurizer)
        held = [*arrays.values(), *self.tensors.values(), self.confidence.directions]
        return sum(array.nbytes for array in held) / 2**20

    def predict_proba(
        self, weights: Float[np.ndarray, "adapters params"], layout: Layout | None = None
    ) -> Float[np.ndarray, "adapters classes"]:
        """Probabilities of the classes, given that each adapter is of one of them.

        They are calibrated on validation rows, unless the bundle is of format 1.

        Args:
            weights: rows in the bundle's layout.
            layout: what the rows are said to be; checked against the bundle's.

        Raises:
            LayoutError: the rows are of another layout.
        """
        return self.judge(weights, layout).probabilities

    def verdict(
        self,
        weights: Float[np.ndarray, "adapters params"],
        layout: Layout | None = None,
        *,
        projected: bool | Sequence[bool] | np.ndarray = False,
    ) -> list[Verdict]:
        """Name the class of each adapter, or abstain and say why.

        Args:
            weights: rows in the bundle's layout.
            layout: what the rows are said to be; checked against the bundle's.
            projected: whether the weights (all, or each row's) are not those of the file but
                factors of the nearest update that fits the layout. Their numbers are one choice of
                many, so a bundle with ``gauge == "raw"`` abstains.

        Raises:
            LayoutError: the rows are of another layout.
        """
        judged = self.judge(weights, layout)
        if self.gauge == "raw":
            judged = judged.abstain(np.asarray(projected, bool), "projected")
        return judged.verdicts(self.classes)

    def judge(
        self, weights: Float[np.ndarray, "adapters params"], layout: Layout | None = None
    ) -> Judged:
        """The verdicts as arrays: for many adapters.

        Args:
            weights: rows in the bundle's layout.
            layout: what the rows are said to be; checked against the bundle's.

        Raises:
            LayoutError: the rows are of another layout.
        """
        if layout is not None and layout.fingerprint != self.layout.fingerprint:
            raise LayoutError(
                "this bundle reads another kind of adapter: "
                + (self.layout.difference(layout) or "the layouts differ")
            )
        mean, scale = (torch.from_numpy(self.tensors[f"scaler.{k}"]) for k in ("mean", "scale"))
        classes = len(self.classes)
        seen = [Seen(np.empty((0, classes)), np.empty(0), np.empty(0))]
        finite = np.ones(len(weights), bool)
        for start in range(0, len(weights), ROWS_AT_ONCE):
            block = slice(start, start + ROWS_AT_ONCE)
            rows, finite[block] = _without_nan(weights[block])
            features = np.array(self.featurizer.transform(rows), np.float32)
            standard = (torch.from_numpy(features) - mean) / scale
            seen.append(Seen.of(self._model, standard, self.confidence.directions))
        whole = Seen.join(seen)
        whole.logits[~finite] = np.nan
        return self.confidence.judge(whole)

    def predict(self, adapter: Adapter) -> dict[str, float]:
        """Class probabilities of one adapter, the likeliest first; see `verdict` for abstention."""
        return self.verdict(adapter.flat()[None], adapter.layout)[0].probabilities

    def save(self, folder: str | Path) -> Path:
        """Write the bundle; an older one in the folder is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays, values = fitted_state(self.featurizer)
        tensors = {**self.tensors, **{f"featurizer.{k}": v for k, v in arrays.items()}}
        tensors[DIRECTIONS] = self.confidence.directions
        calibration = self.confidence.calibration
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(tensors, folder / MODEL)
        info = {
            "format": FORMAT,
            "lora_ws": version("lora_ws"),
            "sha256": file_sha256(folder / MODEL),
            "classes": self.classes,
            "hidden": self.hidden,
            "featurizer": {**to_plain(self.featurizer), "fitted": values},
            "fingerprint": self.layout.fingerprint,
            "layout": self.layout.to_dict(),
            "gauge": self.gauge,
            "calibration": calibration and asdict(calibration),
            "training": self.training,
        }
        info["info_sha256"] = _hash(info)
        (folder / INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")
        (folder / CARD).write_text(self.model_card(), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, allow_classes: tuple[str, ...] = ()) -> "Bundle":
        """Read a bundle.

        Args:
            folder: where it is.
            allow_classes: dotted paths of featurizers outside this library that it may name.

        Raises:
            NotAvailableError: there is no bundle.
            DataError: it is damaged, of a later format, or its hash does not match.
            ConfigError: it names a featurizer that is not allowed.
        """
        folder = Path(folder)
        if not (folder / INFO).is_file():
            raise NotAvailableError(f"{folder}: no bundle here (expected {INFO} and {MODEL})")
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            if info["format"] > FORMAT:
                raise DataError(
                    f"{folder}: bundle format {info['format']}, this version reads up to {FORMAT}; "
                    "upgrade lora_ws"
                )
            if info["sha256"] != file_sha256(folder / MODEL):
                raise DataError(f"{folder}: {MODEL} does not match its hash; fetch it again")
            if info.pop("info_sha256") != _hash(info):
                raise DataError(f"{folder}: {INFO} was changed after it was made; fetch it again")
            tensors = load_file(folder / MODEL)
            layout = Layout.from_dict(info["layout"])
            featurizer = restore(info["featurizer"], tensors, layout, allow_classes)
            own = {k: v for k, v in tensors.items() if k.startswith(("model.", "scaler."))}
            classes, hidden = tuple(info["classes"]), tuple(info["hidden"])
            # Format 1 knew no confidence.
            width = len(own["scaler.mean"])
            held, none = info["calibration"], np.zeros((len(classes), width), np.float32)
            directions = tensors.get(DIRECTIONS, none)
            confidence = Confidence(directions, Calibration(**held) if held else None)
            bundle = cls(featurizer, own, layout, classes, hidden, info["training"], confidence)
            if directions.shape != (len(classes), width):
                raise ValueError(f"directions of shape {directions.shape}")
            _ = bundle._model  # a network of other widths does not load
        except DAMAGE as error:
            if isinstance(error, DataError | ConfigError):
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
            return push_folder(saved, repo_id, "Upload lora_ws bundle", private=private)

    def model_card(self) -> str:
        """The README of the bundle."""
        return card_text(
            self.training,
            self.classes,
            self.layout,
            self.confidence.calibration,
            gauge=self.gauge,
            size_mb=self.size_mb,
        )

    @cached_property
    def _model(self) -> MLP:
        model = MLP(len(self.tensors["scaler.mean"]), len(self.classes), self.hidden)
        names = [name for name in self.tensors if name.startswith("model.")]
        state = {n.removeprefix("model."): torch.from_numpy(self.tensors[n]) for n in names}
        model.load_state_dict(state)
        return model.eval()


def _without_nan(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with zeros in place of those that hold NaN or infinity, and which do not."""
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    return (rows if finite.all() else np.where(finite[:, None], rows, 0)), finite


def _hash(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
