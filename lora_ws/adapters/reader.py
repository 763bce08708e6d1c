"""A safetensors file, or a PEFT folder, becomes one `Adapter`: factors, effective scale, origin.

Reads the diffusers spellings (old attention processors, current, PEFT-style) of U-Net adapters.
Other spellings are refused with a reason; nothing is guessed.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from lora_ws.adapters.keys import DORA_MARKS, parse_key
from lora_ws.adapters.layout import Layout
from lora_ws.errors import AdapterError, LayoutError

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Where diffusers keeps the same facts inside a file, keys prefixed with the model's name.
HEADER_CONFIG = "lora_adapter_metadata"
MAX_RANK = 4096


@dataclass(frozen=True)
class Adapter:
    """One adapter read from a file.

    Attributes:
        down: module path -> A, float32 ``[rank, in_features]``, as stored.
        up: module path -> B, float32 ``[out_features, rank]``, as stored.
        scale: module path -> the factor of ``B @ A`` that the file asks for (alpha / rank).
        layout: shapes and order of the factors.
        source: the file it came from.
        sha256: hash of the file's bytes.
        other_keys: tensors that are no factors of U-Net modules: not read, but counted and said.
    """

    down: dict[str, np.ndarray]
    up: dict[str, np.ndarray]
    scale: dict[str, float]
    layout: Layout
    source: Path
    sha256: str
    other_keys: tuple[str, ...] = ()

    def flat(self) -> Float[np.ndarray, " params"]:
        """The factors in layout order, with the scale folded into B so the update is ``B @ A``."""
        parts = []
        for layer in self.layout.layers:
            up = self.up[layer.name] * np.float32(self.scale[layer.name])
            parts += [self.down[layer.name].ravel(), up.ravel()]
        return np.concatenate(parts).astype(np.float32, copy=False)


def read_adapter(path: str | Path) -> Adapter:
    """Read one adapter.

    Args:
        path: a ``.safetensors`` file, or a PEFT folder with its ``adapter_config.json``.

    Raises:
        AdapterError: the file is missing, damaged, not safetensors, holds no U-Net factors, or
            holds values that are not finite. The message names the file.
    """
    path = Path(path)
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise AdapterError(f"{path}: expected a .safetensors file or a PEFT folder, found neither")
    if file.suffix != ".safetensors":
        raise AdapterError(
            f"{file}: expected a .safetensors file, got `{file.suffix or 'no suffix'}`; "
            "pickled files can run code when opened and are refused: convert the file first"
        )
    try:
        return _read(file)
    except LayoutError as error:
        raise AdapterError(f"{file}: {error}") from error


def _read(file: Path) -> Adapter:
    tensors, other, header = _load(file)
    factors: dict[str, dict[str, np.ndarray]] = {"down": {}, "up": {}, "alpha": {}}
    for key, value in tensors.items():
        parsed = parse_key(key)
        assert parsed is not None  # others were not loaded
        if parsed.path in factors[parsed.role]:
            raise AdapterError(f"{file}: `{key}` names layer `{parsed.path}` a second time")
        if not np.isfinite(value).all():
            raise AdapterError(f"{file}: `{key}` holds NaN or infinite values")
        factors[parsed.role][parsed.path] = value
    down, up = factors["down"], factors["up"]
    if not down and not up:
        raise AdapterError(_nothing_found(file, other))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for role in ("down", "up"):
        for name, value in factors[role].items():
            shapes.setdefault(name, {})[role] = value.shape
    layout = Layout.from_shapes(shapes)
    for layer in layout.layers:
        if layer.rank > MAX_RANK:
            raise AdapterError(f"{file}: rank {layer.rank} of `{layer.name}` is above {MAX_RANK}")
    scale = _scales(file, layout, factors["alpha"], _config(file, header))
    return Adapter(down, up, scale, layout, file, file_sha256(file), tuple(other))


def _load(file: Path) -> tuple[dict[str, np.ndarray], list[str], dict[str, str]]:
    """The tensors that are factors or alphas, the names of the others, and the header's text."""
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            if dora := [key for key in keys if any(mark in key for mark in DORA_MARKS)]:
                raise AdapterError(
                    f"{file}: `{dora[0]}` makes this a DoRA adapter, whose update depends on the "
                    "base model's weights; only plain LoRA is read"
                )
            ours = [key for key in keys if parse_key(key)]
            # bfloat16 has no numpy type: torch widens it, exactly.
            tensors = {key: opened.get_tensor(key).to(torch.float32).numpy() for key in ours}
            other = [key for key in keys if key not in tensors]
            return tensors, other, opened.metadata() or {}
    except AdapterError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        hint = "the download may be incomplete" if file.stat().st_size else "the file is empty"
        raise AdapterError(f"{file}: not a readable safetensors file ({error}); {hint}") from error


def _config(file: Path, header: dict[str, str]) -> dict[str, Any]:
    """What adapter_config.json, or the same facts in the file's header, say about the scale."""
    config_file = file.with_name(PEFT_CONFIG)
    if file.name == PEFT_WEIGHTS and config_file.is_file():
        origin, text, prefix = str(config_file), config_file.read_bytes(), ""
    elif HEADER_CONFIG in header:
        origin, text, prefix = f"{file}: {HEADER_CONFIG}", header[HEADER_CONFIG], "unet."
    else:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise AdapterError(f"{origin}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{origin}: expected a JSON object, got {type(config).__name__}")
    config = {key.removeprefix(prefix): config[key] for key in config if key.startswith(prefix)}
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AdapterError(
            f"{origin}: rank_pattern and alpha_pattern are not supported yet; "
            "re-save the adapter with one rank and alpha"
        )
    alpha = config.get("lora_alpha", 0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{origin}: expected `lora_alpha` to be a number, got {alpha!r}")
    return config


def _scales(
    file: Path, layout: Layout, alphas: dict[str, np.ndarray], config: dict[str, Any]
) -> dict[str, float]:
    """The effective factor per layer: alpha tensors, else the configuration, else 1."""
    scales = {}
    for layer in layout.layers:
        if layer.name in alphas:
            alpha = alphas[layer.name]
            if alpha.size != 1:
                raise AdapterError(
                    f"{file}: expected one number as alpha of `{layer.name}`, got shape "
                    f"{alpha.shape}"
                )
            scales[layer.name] = alpha.item() / layer.rank or 1.0
        elif "lora_alpha" in config:
            divisor = math.sqrt(layer.rank) if config.get("use_rslora") else layer.rank
            scales[layer.name] = float(config["lora_alpha"]) / divisor
        else:
            scales[layer.name] = 1.0
    return scales


def _nothing_found(file: Path, keys: list[str]) -> str:
    if not keys:
        return f"{file}: holds no tensors"
    if all("text_encoder" in key or "text_model" in key for key in keys):
        return f"{file}: adapts only the text encoder; expected U-Net modules"
    return (
        f"{file}: expected diffusers or PEFT names of U-Net modules such as "
        f"`unet.down_blocks.0...to_q.lora.down.weight`, got names such as `{keys[0]}`"
    )


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
