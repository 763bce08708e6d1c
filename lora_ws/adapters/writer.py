"""Write an adapter as a file of another format, with the same effective update.

Scales differ in where they are kept, so the factor is folded into B and every file says 1.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save_file

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.architectures import by_underscores, sgm_names
from lora_ws.adapters.locate import PEFT_PICKLE, PEFT_WEIGHTS
from lora_ws.adapters.settings import PEFT_CONFIG
from lora_ws.errors import AdapterError, ConfigError

FileFormat = Literal["peft", "diffusers", "kohya"]
KOHYA_PREFIXES = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
}


def write_adapter(adapter: Adapter, folder: Path, to: FileFormat, *, sdxl: bool = False) -> Path:
    """Write an adapter.

    Args:
        adapter: of one denoiser, perhaps with text encoders; read whole.
        folder: new or empty.
        to: ``peft`` writes the denoiser's folder of PEFT (weights and configuration), ``diffusers``
            and ``kohya`` a file named like the source.
        sdxl: kohya's names of SDXL number blocks as its original implementation does.

    Returns:
        the file of weights.

    Raises:
        AdapterError: the format has no place for a part of it.
        ConfigError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another folder")
    name = {"peft": _peft_key, "diffusers": _diffusers_key, "kohya": _kohya_key(sdxl)}[to]
    tensors: dict[str, np.ndarray] = {}
    for module in adapter.modules.values():
        if module.needs_base:
            raise AdapterError(
                f"{adapter.source}: `{module.path}` is of DoRA, whose size depends on the base "
                "model; it cannot be written as plain factors",
                "needs-base",
            )
        try:
            stem = name(module)
        except KeyError as error:
            raise AdapterError(
                f"{adapter.source}: {to} has no name for `{module.name}`; choose another --to",
                "unmapped",
            ) from error
        tensors |= _tensors(module, stem, to)
    folder.mkdir(parents=True, exist_ok=True)
    if to == "peft":
        (folder / PEFT_CONFIG).write_text(
            json.dumps(_peft_config(adapter), indent=1), encoding="utf-8"
        )
    file = folder / (PEFT_WEIGHTS if to == "peft" else f"{_stem(adapter)}.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def _stem(adapter: Adapter) -> str:
    source = Path(adapter.source)
    return source.parent.name if source.name in (PEFT_WEIGHTS, PEFT_PICKLE) else source.stem


def _tensors(module: Module, stem: str, to: FileFormat) -> dict[str, np.ndarray]:
    up = module.scaled_up.astype(np.float32)
    down = module.down.astype(np.float32)
    if module.kernel:
        down = down.reshape(len(down), -1, *module.kernel)
        up = up.reshape(*up.shape, *(1 for _ in module.kernel))
    if to == "peft":
        return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    if to == "diffusers":
        return {f"{stem}.lora.down.weight": down, f"{stem}.lora.up.weight": up}
    alpha = np.array(module.rank, np.float32)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def _peft_key(module: Module) -> str:
    if module.component not in ("unet", "transformer"):
        raise KeyError(module.name)  # a folder of PEFT holds one component
    return f"base_model.model.{module.path}"


def _diffusers_key(module: Module) -> str:
    return f"{module.component}.{module.path}"


def _kohya_key(sdxl: bool) -> Callable[[Module], str]:
    def name(module: Module) -> str:
        path = module.path.replace(".", "_")
        if by_underscores(module.component)[path] != module.path:
            raise KeyError(module.name)
        prefix = KOHYA_PREFIXES[module.component]
        if sdxl:
            prefix = "lora_te1_" if module.component == "text_encoder" else prefix
            path = sgm_names()[path] if module.component == "unet" else path
        return prefix + path

    return name


def _peft_config(adapter: Adapter) -> dict[str, object]:
    ranks = {m.path: m.rank for m in adapter.modules.values()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
