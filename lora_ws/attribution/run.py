"""`run`: the same image without each of its adapters."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_ws.attribution.ablation import Ablation, ablate, draw_subsets
from lora_ws.attribution.boxes import BoxScores, attribute_boxes
from lora_ws.attribution.metadata import ImageMetadata, adapter_files, read_metadata
from lora_ws.attribution.shapley import Shapley, shapley
from lora_ws.attribution.spec import AttributeSpec
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.diffusion.stack import AdapterStack
from lora_ws.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Attributed:
    """What the adapters of an image did.

    Attributes:
        adapters: as they were named.
        generation: what was drawn.
        ablation: the image with all adapters, with none, and without each.
        shapley: values of the distance to the image without any; None where not asked for.
        boxes: scores of the adapters for parts of the image, likewise.
    """

    adapters: tuple[str, ...]
    generation: GenerationSpec
    ablation: Ablation
    shapley: Shapley | None = None
    boxes: BoxScores | None = None


def run(spec: AttributeSpec) -> Attributed:
    """Draw the image again without each of its adapters.

    Raises:
        ConfigError: adapters or prompt are neither given nor named by an image, or do not fit.
        DataError: the image does not say how it was made, or an adapter that it names is missing.
        AdapterError: an adapter cannot be read, or holds more than can be applied.
        LayoutError: the adapters are of another base.
    """
    adapters, scales, generation = _resolved(spec)
    stack = AdapterStack.of(adapters, scales, ignore_other=spec.ignore_other)
    pipeline = load_pipeline(spec.base)
    boxes = attribute_boxes(pipeline, stack, generation, spec.boxes) if spec.boxes else None
    how: dict[str, Any] = {"start": spec.start, "batch": spec.batch}
    ablation = ablate(pipeline, stack, generation, shown=spec.shown, **how)

    def worth(subsets: np.ndarray) -> np.ndarray:
        images = draw_subsets(pipeline, stack, generation, torch.from_numpy(subsets), **how)
        return (images - ablation.base).abs().mean(dim=(1, 2, 3)).numpy()

    values = shapley(worth, len(stack)) if spec.shapley else None
    return Attributed(tuple(adapters), generation, ablation, values, boxes)


def _resolved(spec: AttributeSpec) -> tuple[list[str], list[float] | None, GenerationSpec]:
    """Adapters, scales and settings: what is given, else what the image says, else the defaults."""
    said = read_metadata(spec.from_image) if spec.from_image else None
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
