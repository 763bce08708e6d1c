"""`Bundle`: a trained classifier as tensors and JSON: no pickle, nothing that runs on loading.

A bundle is a folder with ``model.safetensors`` (network, scaler, fitted featurizer) and
``bundle.json`` (what they mean). It refuses weights of another layout.
"""

import hashlib
import importlib
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_ws.adapters import Adapter, Layout
from lora_ws.adapters.source import file_sha256
from lora_ws.config import to_plain
from lora_ws.errors import ConfigError, DataError, LayoutError, NotAvailableError
from lora_ws.hub import push_folder
from lora_ws.learn.hub import fetch_bundle
from lora_ws.models import MLP
from lora_ws.report.records import METRICS, RunRecord

if TYPE_CHECKING:
    from lora_ws.learn.features import Prepared
    from lora_ws.learn.module import LoraModule

MODEL, INFO, CARD = "model.safetensors", "bundle.json", "README.md"
FORMAT = 1
ROWS_AT_ONCE = 256
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
CARD_TEXT = """---
library_name: lora_ws
tags: [lora, weight-space]
---

# {name} on {dataset}

Names the class of a LoRA adapter from its weights: {classes}.

```python
import lora_ws

bundle = lora_ws.Bundle.from_pretrained("...")
bundle.predict(lora_ws.read_adapter("file.safetensors"))
```

Trained on `{dataset}`{subset} ({n_train} adapters, data version `{data_version}`), seed {seed},
protocol {protocol}. It reads {layers} layers ({size} numbers, layout `{fingerprint}`) and refuses
other adapters.

Test metrics of this seed on {n_test} adapters, percent:

| metric | value |
|---|--:|
{metrics}
Probabilities are not calibrated. Use it to sort what people should look at, never to certify that
an adapter is harmless.
"""


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
        revision: Hub commit it was read from, or empty.
    """

    featurizer: Any
    tensors: dict[str, np.ndarray]
    layout: Layout
    classes: tuple[str, ...]
    hidden: tuple[int, ...]
    training: dict[str, Any]
    revision: str = ""

    @classmethod
    def build(cls, prepared: "Prepared", module: "LoraModule", record: RunRecord) -> "Bundle":
        """Take what a finished seed needs to be used again.

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
        )

    def predict_proba(
        self, weights: Float[np.ndarray, "adapters params"], layout: Layout | None = None
    ) -> Float[np.ndarray, "adapters classes"]:
        """Probabilities of the classes: a softmax, not calibrated.

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
        parts = []
        for start in range(0, len(weights), ROWS_AT_ONCE):
            features = self.featurizer.transform(weights[start : start + ROWS_AT_ONCE])
            rows = torch.from_numpy(np.array(features, np.float32))
            with torch.inference_mode():
                parts.append(self._model((rows - mean) / scale).softmax(1).numpy())
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)

    def predict(self, adapter: Adapter) -> dict[str, float]:
        """Class probabilities of one adapter, the likeliest first."""
        values = self.predict_proba(adapter.flat()[None], adapter.layout)[0]
        order = np.argsort(-values)
        return {self.classes[k]: float(values[k]) for k in order}

    def save(self, folder: str | Path) -> Path:
        """Write the bundle; an older one in the folder is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays, values = _fitted_state(self.featurizer)
        tensors = {**self.tensors, **{f"featurizer.{k}": v for k, v in arrays.items()}}
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
            "thresholds": {},
            "calibration": None,
            "training": self.training,
        }
        info["info_sha256"] = _hash(info)
        (folder / INFO).write_text(json.dumps(info, indent=1))
        (folder / CARD).write_text(self.model_card())
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
            info = json.loads((folder / INFO).read_text())
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
            featurizer = _restore(info["featurizer"], tensors, layout, allow_classes)
            own = {k: v for k, v in tensors.items() if not k.startswith("featurizer.")}
            classes, hidden = tuple(info["classes"]), tuple(info["hidden"])
            bundle = cls(featurizer, own, layout, classes, hidden, info["training"])
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
        record = self.training
        return CARD_TEXT.format(
            name=record["name"],
            dataset=record["dataset"],
            subset=f", subset `{record['subset']}`" if record["subset"] else "",
            classes=", ".join(self.classes),
            n_train=record["n_train"],
            n_test=record["n_test"],
            data_version=record["data_version"][:12],
            seed=record["seed"],
            protocol=record["protocol"],
            layers=len(self.layout.layers),
            size=self.layout.size,
            fingerprint=self.layout.fingerprint,
            metrics="".join(f"| {m} | {100 * record['test'][m]:.2f} |\n" for m in METRICS),
        )

    @cached_property
    def _model(self) -> MLP:
        model = MLP(len(self.tensors["scaler.mean"]), len(self.classes), self.hidden)
        names = [name for name in self.tensors if name.startswith("model.")]
        state = {n.removeprefix("model."): torch.from_numpy(self.tensors[n]) for n in names}
        model.load_state_dict(state)
        return model.eval()


def _fitted_state(featurizer: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What ``fit`` left behind: arrays, and values that JSON can hold."""
    arrays, values = {}, {}
    for name, value in vars(featurizer).items():
        if not name.endswith("_") or name.startswith("_"):
            continue
        if isinstance(value, np.ndarray) and value.dtype != object:
            arrays[name] = value
        elif isinstance(value, np.generic):
            values[name] = value.item()
        elif _is_plain(value):
            values[name] = value
        else:
            raise ConfigError(
                f"{type(featurizer).__name__}.{name} is a {type(value).__name__}; a bundle holds "
                "arrays, numbers and text only"
            )
    return arrays, values


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def _restore(
    info: dict[str, Any],
    tensors: dict[str, np.ndarray],
    layout: Layout,
    allow_classes: tuple[str, ...],
) -> Any:
    path = info["class_path"]
    # Importing a module runs it, so a bundle may not name any module it likes.
    if not path.startswith("lora_ws.featurizers.") and path not in allow_classes:
        raise ConfigError(
            f"the bundle's featurizer `{path}` is not part of lora_ws; if you trust it, pass "
            f'allow_classes=("{path}",)'
        )
    module, _, name = path.rpartition(".")
    featurizer = getattr(importlib.import_module(module), name)(**info["init_args"])
    if "layout" in featurizer.get_params():
        featurizer.set_params(layout=layout)
    for key, value in info["fitted"].items():
        setattr(featurizer, key, tuple(value) if isinstance(value, list) else value)
    for key, value in tensors.items():
        if key.startswith("featurizer."):
            setattr(featurizer, key.removeprefix("featurizer."), value)
    return featurizer


def _hash(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
