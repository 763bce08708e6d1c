"""From a finished seed to a bundle that was read back and predicts the same."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import Confidence
from lora_ws.config import class_path
from lora_ws.errors import ConfigError, LoraWsError
from lora_ws.learn.calibration import fit_confidence, fit_heads
from lora_ws.learn.features import Prepared
from lora_ws.learn.result import Fitted
from lora_ws.models import Metanetwork

# Rows on which the bundle that was read back is compared.
PROBE = 8


def make_bundle(fitted: Fitted, confidence: Confidence | None = None) -> Bundle:
    """Take what a finished seed needs to be used again.

    Args:
        fitted: the seed.
        confidence: fitted already on the same seed; None fits it.

    Raises:
        ConfigError: it reads no weights, gives no probabilities, or tensors cannot hold it.
    """
    spec, prepared, _ = fitted.job
    if not prepared.task.gives_probabilities:
        named = [head.task.name for head in prepared.task.heads] or [prepared.task.name]
        raise ConfigError(f"a bundle holds probabilities; a {named[0]} has none")
    if prepared.featurizer is None:
        raise ConfigError("a network on metadata reads no weights; nothing to bundle")
    network: Any = fitted.network
    state = fitted.network.state_dict().items()
    return Bundle(
        featurizer=prepared.featurizer,
        # What scikit-learn fitted is a network of another spec.
        model=prepared.task.network(
            spec.model if isinstance(spec.model, Metanetwork) else network.network
        ),
        inputs=prepared.inputs,
        tensors={name: value.detach().cpu().numpy() for name, value in state},
        layout=prepared.adapters.layout,
        classes=prepared.task.classes,
        training=fitted.record.to_dict(),
        confidence=confidence
        or fit_confidence(prepared, fitted.network, fitted.out_of_fold).confidence,
        heads=fit_heads(prepared, fitted.network),
    )


def pack(fitted: Fitted, folder: Path, confidence: Confidence | None = None) -> None:
    """Write the bundle of a finished seed, after proving that it can be read.

    An older bundle in the folder is replaced once the new one is proven.

    Args:
        fitted: the seed.
        folder: of the bundle.
        confidence: fitted already on the same seed; None fits it.

    Raises:
        ConfigError: no bundle can hold it, or what is read back predicts something else.
    """
    made = make_bundle(fitted, confidence)
    half = folder.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    try:
        _prove(made, made.save(half), fitted.job.prepared)
        shutil.rmtree(folder, ignore_errors=True)
        half.rename(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _prove(made: Bundle, folder: Path, prepared: Prepared) -> None:
    own = tuple(class_path(part) for part in (made.featurizer, made.model))
    rows = np.asarray(prepared.adapters.weights[prepared.split.val[:PROBE]])
    try:
        read = Bundle.load(folder, allow_classes=own)
        same = np.array_equal(read.predict_proba(rows), made.predict_proba(rows))
    except LoraWsError as error:
        raise ConfigError(f"the bundle cannot be read back: {error}") from error
    if not same:
        raise ConfigError(
            f"the bundle read back gives other probabilities; `{own[0]}` or `{own[1]}` keeps state "
            "that is neither a fitted attribute ending in `_` nor part of a state dict"
        )
