"""A safetensors file, or a PEFT folder, becomes one `Adapter`: factors, effective scale, origin.

Reads the diffusers spellings (old attention processors, current, PEFT-style) of U-Net adapters.
Other spellings are refused with a reason; nothing is guessed.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from lora_ws.adapters.keys import parse_key
from lora_ws.adapters.layout import Layout
from lora_ws.errors import AdapterError, LayoutError

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
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
        other_keys: tensors that are no factors of U-Net modules; kept out, never hidden.
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
    tensors = _load(file)
    factors: dict[str, dict[str, np.ndarray]] = {"down": {}, "up": {}, "alpha": {}}
    other = []
    for key, value in tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            other.append(key)
            continue
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
    scale = _scales(file, layout, factors["alpha"])
    return Adapter(down, up, scale, layout, file, _sha256(file), tuple(other))


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="pt") as opened:
            # bfloat16 has no numpy type: torch widens it, exactly.
            return {key: opened.get_tensor(key).to(torch.float32).numpy() for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        hint = "the download may be incomplete" if file.stat().st_size else "the file is empty"
        raise AdapterError(f"{file}: not a readable safetensors file ({error}); {hint}") from error


def _scales(file: Path, layout: Layout, alphas: dict[str, np.ndarray]) -> dict[str, float]:
    """The effective factor per layer: alpha tensors, else adapter_config.json, else 1."""
    config_file = file.with_name(PEFT_CONFIG)
    config = {}
    if file.name == PEFT_WEIGHTS and config_file.is_file():
        try:
            config = json.loads(config_file.read_text())
        except ValueError as error:
            raise AdapterError(f"{config_file}: not readable as JSON ({error})") from error
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            raise AdapterError(
                f"{config_file}: rank_pattern and alpha_pattern are not supported yet; "
                "re-save the adapter with one rank and alpha"
            )
    scales = {}
    for layer in layout.layers:
        if layer.name in alphas:
            scales[layer.name] = float(alphas[layer.name].ravel()[0]) / layer.rank or 1.0
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


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
