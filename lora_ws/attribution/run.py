"""`run`: the same image without each of its adapters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.attribution.ablation import Ablation, ablate, draw_subsets
from lora_ws.attribution.boxes import BoxScores, attribute_boxes
from lora_ws.attribution.metadata import ImageMetadata, adapter_files, read_metadata
from lora_ws.attribution.shapley import Shapley, shapley
from lora_ws.attribution.spec import AttributeSpec
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import image_size, load_base
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError, notice

# Settings of an image by the field that says them otherwise.
ASKED = {
    "prompt": "prompt",
    "seed": "seed",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
}


@dataclass(frozen=True, eq=False)
class Attributed:
    """What the adapters of an image did.

    Attributes:
        adapters: as they were named.
        generation: what was drawn.
        ablation: the image with all adapters, with none, and without each.
        shapley: values of the distance to the image without any; None where not asked for.
        boxes: scores of the adapters for parts of the image, likewise.
        given: the image of `from_image`, from -1 to 1, resized to the generated; None without.
        left_out: its settings that are not reproduced, name -> value.
    """

    adapters: tuple[str, ...]
    generation: GenerationSpec
    ablation: Ablation
    shapley: Shapley | None = None
    boxes: BoxScores | None = None
    given: Float[Tensor, "3 height width"] | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def distance(self) -> float | None:
        """Mean absolute difference of the given image and the generated one."""
        return None if self.given is None else mean_difference(self.given, self.ablation.full)


def run(spec: AttributeSpec) -> Attributed:
    """Draw the image again without each of its adapters.

    Warns:
        Notice: for each setting of the given image that cannot be reproduced.

    Raises:
        ConfigError: adapters or prompt are neither given nor named by an image, or do not fit.
        DataError: the image does not say how it was made, or an adapter that it names is missing.
        AdapterError: an adapter cannot be read, or holds more than can be applied.
        LayoutError: the adapters are of another base.
    """
    said = read_metadata(spec.from_image) if spec.from_image else None
    adapters, scales, generation = _resolved(spec, said)
    stack = AdapterStack.of(adapters, scales, ignore_other=spec.ignore_other)
    if said and spec.adapters is None and spec.scales is None:
        stack = replace(stack, text_ratios=_text_ratios(said))
    pipeline = load_base(spec)
    left_out = _left_out(spec, said, pipeline) if said else {}
    for name, value in left_out.items():
        notice(
            f"from_image: {name} ({value}) is not reproduced; the image generated is another one"
        )
    boxes = attribute_boxes(pipeline, stack, generation, spec.boxes) if spec.boxes else None
    how: dict[str, Any] = {"start": spec.start, "batch": spec.batch}
    ablation = ablate(pipeline, stack, generation, shown=spec.shown, **how)

    def worth(subsets: np.ndarray) -> np.ndarray:
        images = draw_subsets(pipeline, stack, generation, torch.from_numpy(subsets), **how)
        return (images - ablation.base).abs().mean(dim=(1, 2, 3)).numpy()

    values = shapley(worth, len(stack)) if spec.shapley else None
    given = _picture(spec.from_image, image_size(pipeline)) if spec.from_image else None
    return Attributed(tuple(adapters), generation, ablation, values, boxes, given, left_out)


def _text_ratios(said: ImageMetadata) -> tuple[float, ...]:
    """Scales of text encoders over those of the denoiser; 1 where that is 0."""
    scales = said.adapters.items()
    return tuple(said.text_scales.get(k, own) / own if own else 1.0 for k, own in scales)


def mean_difference(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference of the pixels of two images."""
    return float((one - other).abs().mean())


def _left_out(spec: AttributeSpec, said: ImageMetadata, pipeline: Any) -> dict[str, str]:
    """Settings of the image that are neither given nor those of the pipeline."""
    size = image_size(pipeline)
    scheduler = type(pipeline.scheduler).__name__.removesuffix("Scheduler").lower()
    same = {"Size": f"{size}x{size}", "Sampler": scheduler, "sampler_name": scheduler}
    texts = {
        f"text encoder of {name}": f"{text:g}"
        for name, text in said.text_scales.items()
        if not said.adapters[name] and spec.adapters is None
    }
    return texts | {
        name: value
        for name, value in said.other_settings.items()
        if value.lower() != same.get(name)
        and (name not in ASKED or getattr(spec, ASKED[name]) is None)
    }


def _picture(file: Path, size: int) -> Float[Tensor, "3 height width"]:
    """An image file at the size that a pipeline draws."""
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


def _resolved(
    spec: AttributeSpec, said: ImageMetadata | None
) -> tuple[list[str], list[float] | None, GenerationSpec]:
    """Adapters, scales and settings: what is given, else what the image says, else the defaults."""
    adapters, scales = spec.adapters, spec.scales
    if said and not adapters:
        if spec.lora_dir is None:
            raise ConfigError("lora_dir: expected the folder of the adapters the picture names")
        adapters = [str(file) for file in adapter_files(said, spec.lora_dir)]
        scales = scales or list(said.adapters.values())
    prompt = spec.prompt if spec.prompt is not None else said and said.prompt
    if not adapters or prompt is None:
        raise ConfigError("expected --adapters and --prompt, or --from_image and --lora_dir")
    names = ("negative_prompt", "guidance_scale", "num_inference_steps", "seed")
    known = {name: _first(getattr(spec, name), said, name) for name in names}
    settings: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
    return adapters, scales, GenerationSpec(prompt, **settings)


def _first(given: Any, said: ImageMetadata | None, name: str) -> Any:
    return given if given is not None or said is None else getattr(said, name)
