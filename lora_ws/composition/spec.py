"""`ComposeSpec`: what `lora-ws compose` is asked for.

Its fields are the command's flags and the keys of a YAML file.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_ws.diffusion.base_spec import PipelineSpec
from lora_ws.diffusion.generation import MOST_IMAGES, MOST_SCALE, MOST_SEED, GenerationSpec
from lora_ws.diffusion.methods import Method
from lora_ws.diffusion.text_encoders import TextMode
from lora_ws.diffusion.turns import AdaptiveSwitch  # noqa: F401, so that --method knows the name
from lora_ws.errors import check_range


@dataclass(frozen=True, kw_only=True)
class ComposeSpec(PipelineSpec, GenerationSpec):
    """Adapters of one base, and how to generate images with all of them.

    Attributes:
        adapters: adapter files of this base: files, PEFT folders, or
            hf://owner/name/file.safetensors.
        prompt: prompt of the images.
        method: method of composition, by class name or dotted path, with its options, such as
            --method.tau; null is Merge.
        scales: one per adapter; null takes 1 for each.
        block_weights: weights per block of the U-Net, one text per adapter: 17 or 26 numbers for
            SD1.x, 12 or 20 for SDXL, or names such as in04=0.5,mid=0; 1 for an adapter without.
        triggers: one phrase of the prompt per adapter; Switch and Composite weight adapters by the
            relevance of their phrase to the prompt.
        text: adapters in the text encoder: all added (merged), the first only (first), those of
            each prediction (per_adapter; Switch and Composite), or none.
        images: images per row.
        seeds: seeds of the noise, one per image, instead of seed, seed + 1 and so on.
        scheduler: class of diffusers, such as EulerDiscreteScheduler; null takes that of the base.
        out: PNG file of the grid; beside it go a page with intermediate steps and norms of
            updates, a JSON file of the settings, and a folder of the single images with metadata
            for A1111 and ComfyUI.
        export: output folder for the merged adapter, in diffusers' format; Merge only.
        ignore_other: ignore weights that are neither linear modules nor 2-D convolutions, such as
            embeddings.
    """

    adapters: list[str]
    prompt: str
    method: Method | None = None
    scales: list[float] | None = None
    block_weights: list[str] | None = None
    triggers: list[str] | None = None
    text: TextMode = "merged"
    images: int = 4
    seeds: list[int] | None = None
    scheduler: str | None = None
    out: Path = Path("composed.png")
    export: Path | None = None
    ignore_other: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for seed in self.seeds or []:
            check_range("seeds", seed, 0, MOST_SEED)
        check_range("images", self.images, 1, MOST_IMAGES)
        for scale in self.scales or []:
            check_range("scales", scale, -MOST_SCALE, MOST_SCALE)

    @property
    def image_seeds(self) -> list[int]:
        """The seed of each image of a row."""
        return self.seeds or [self.seed + k for k in range(self.images)]
