"""`AttributeSpec`: what `lora-ws attribute` is asked for.

Its fields are the command's flags and the keys of a YAML file.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AttributeSpec:
    """An image, and what is asked of its adapters.

    Attributes:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub.
        adapters: files, PEFT folders, or hf://owner/name/file.safetensors; of this base.
        prompt: what was drawn.
        scales: one per adapter; null takes all of each.
        from_image: image of A1111 or ComfyUI whose metadata fill in what is not given.
        lora_dir: folder of the adapters that the image names.
        negative_prompt: what not to draw; null takes the image's, or none.
        guidance_scale: scale of classifier-free guidance; null takes the image's, or 3.
        num_inference_steps: steps of denoising; null takes the image's, or 30.
        seed: of the noise; null takes the image's, or 0.
        shapley: also Shapley values, from all subsets of up to 6 adapters, sampled beyond.
        boxes: also which adapter made what stands in each of these, left, top, right, bottom in
            pixels, such as [[0,0,8,8],[8,8,16,16]].
        start: leave out from this step on; later is cheaper and less true (docs/attribution.md).
        batch: images at once.
        shown: images on the way that the page shows.
        model: bundle of a classifier that says what each adapter learned.
        ignore_other: leave out what is no linear module of U-Net or text encoder, as convolutions.
        out: folder for the page and its images.
    """

    base: str
    adapters: list[str] | None = None
    prompt: str | None = None
    scales: list[float] | None = None
    from_image: Path | None = None
    lora_dir: Path | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    seed: int | None = None
    shapley: bool = False
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    start: int = 0
    batch: int = 16
    shown: int = 6
    model: str | None = None
    ignore_other: bool = False
    out: Path = Path("attribution")
