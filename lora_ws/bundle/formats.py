"""A bundle's two files: checked by hash, and those of earlier formats translated to today's.

Format 1 knew no confidence; format 2 had one network, an MLP, and its scaler beside it; format 3
names the network by class path and arguments; format 4 has thresholds of labels; format 5 has heads
of further tasks, and networks inside networks.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_ws.adapters.source import file_sha256
from lora_ws.errors import DataError, NotAvailableError

MODEL, INFO = "model.safetensors", "bundle.json"
FORMAT = 5
Tensors = dict[str, np.ndarray]
# What files that are no bundle raise on the way to one.
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
# Numbers of a calibration that formats 1 and 2 called otherwise.
CALIBRATION = {
    "rate": "abstention_rate",
    "usual": "median_alignment",
    "least": "min_alignment",
    "met": "train_norm",
}


def write_files(folder: Path, info: dict[str, Any], tensors: Tensors) -> None:
    """Write both files; older ones are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(whole, folder / MODEL)
    head = {"format": FORMAT, "lora_ws": version("lora_ws"), "sha256": file_sha256(folder / MODEL)}
    info = {**head, **info}
    info["info_sha256"] = _hash(info)
    (folder / INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")


def read_files(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read both files, in today's format.

    Raises:
        NotAvailableError: there is no bundle.
        DataError: it is of a later format, or a hash does not match.
    """
    if not (folder / INFO).is_file():
        raise NotAvailableError(f"{folder}: no bundle here (expected {INFO} and {MODEL})")
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
    if info["format"] < 3:
        info, tensors = _translate(info, tensors)
    return {"thresholds": (), "heads": (), **info}, tensors


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Those whose names start with a prefix, without it."""
    found = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _translate(info: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Formats 1 and 2."""
    mean, scale = tensors.pop("scaler.mean"), tensors.pop("scaler.scale")
    tensors |= {"model.normalizer.mean": mean, "model.normalizer.scale": scale}
    none = np.zeros((len(info["classes"]), len(mean)), np.float32)
    space = {"centre": mean, "scale": scale, "directions": none}
    tensors = {**{f"confidence.{name}": value for name, value in space.items()}, **tensors}
    if info["calibration"]:
        info["calibration"] = {CALIBRATION.get(k, k): v for k, v in info["calibration"].items()}
    hidden = tuple(info.pop("hidden"))
    info["model"] = {"class_path": "lora_ws.models.MLP", "init_args": {"hidden": hidden}}
    return {**info, "width": len(mean)}, tensors


def _hash(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
