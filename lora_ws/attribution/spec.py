"""`AttributeSpec`: what `lora-ws attribute` is asked for.

Its fields are the command's flags and the keys of a YAML file.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_ws.diffusion.base_spec import PipelineSpec
from lora_ws.diffusion.generation import MOST_IMAGES, MOST_SCALE, MOST_STEPS, GenerationSpec
from lora_ws.errors import check_range


@dataclass(frozen=True, kw_only=True)
class AttributeSpec(PipelineSpec):
    """An image, and how to attribute it to its adapters.

    Attributes:
        adapters: adapter files of this base: files, PEFT folders, or
            hf://owner/name/file.safetensors.
        prompt: prompt of the image; null takes the one in `from_image`.
        scales: one per adapter; null takes 1 for each.
        from_image: image by A1111 or ComfyUI; its metadata give the values of flags that are not
            set.
        lora_dir: folder to search for the adapters named in the image.
        negative_prompt: negative prompt; null takes the image's, or none.
        guidance_scale: scale of classifier-free guidance; null takes the image's, or 3.
        num_inference_steps: denoising steps; null takes the image's, or 30.
        seed: seed of the noise; null takes the image's, or 0.
        scheduler: class of diffusers; null takes the image's sampler, or that of the base.
        shapley: also compute Shapley values: exact up to 6 adapters, sampled beyond.
        boxes: also attribute these regions: left, top, right, bottom in pixels, such as
            [[0,0,8,8],[8,8,16,16]].
        start: leave adapters out from this step on; later is cheaper and less exact (see
            docs/attribution.md).
        batch: images per batch.
        shown: intermediate images on the page.
        model: bundle that classifies each adapter.
        ignore_other: ignore weights that are neither linear modules nor 2-D convolutions, such as
            embeddings.
        out: folder for the page and its images.
    """

    adapters: list[str] | None = None
    prompt: str | None = None
    scales: list[float] | None = None
    from_image: Path | None = None
    lora_dir: Path | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    seed: int | None = None
    scheduler: str | None = None
    shapley: bool = False
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    start: int = 0
    batch: int = 16
    shown: int = 6
    model: str | None = None
    ignore_other: bool = False
    out: Path = Path("attribution")

    def __post_init__(self) -> None:
        # It has the checks of what both are given; what is null passes.
        GenerationSpec(self.prompt or "", **self.generation_settings)
        for scale in self.scales or []:
            check_range("scales", scale, -MOST_SCALE, MOST_SCALE)
        check_range("start", self.start, 0, MOST_STEPS)
        check_range("batch", self.batch, 1, MOST_IMAGES)
        check_range("shown", self.shown, 0, MOST_STEPS)

    @property
    def generation_settings(self) -> dict[str, Any]:
        """Those of a `GenerationSpec` that are given, without the prompt."""
        names = (field.name for field in fields(GenerationSpec) if field.name != "prompt")
        given = {name: getattr(self, name, None) for name in names}
        return {name: value for name, value in given.items() if value is not None}
