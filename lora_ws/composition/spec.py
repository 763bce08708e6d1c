"""`ComposeSpec`: what `lora-ws compose` is asked for.

Its fields are the command's flags and the keys of a YAML file.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import Method
from lora_ws.diffusion.text_encoders import TextMode
from lora_ws.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ComposeSpec(GenerationSpec):
    """Adapters of one base that draw together.

    Attributes:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub.
        adapters: files, PEFT folders, or hf://owner/name/file.safetensors; of this base.
        prompt: what to draw.
        method: how the adapters act together, by class name or dotted path, with its own options
            such as --method.tau; null adds them all, as Merge does.
        scales: one per adapter; null takes all of each.
        triggers: phrase of the prompt that each adapter is for; Switch and Composite then weigh
            adapters by how much the prompt asks for them.
        text: of adapters of the text encoder all are added (merged), the first is taken, each
            acts with its own (per_adapter; Switch and Composite), or none.
        images: how many per row.
        out: PNG to write; a page with the course of the steps and the sizes of the updates stands
            beside it.
        export: folder for the merged adapter, as diffusers writes it; with Merge alone.
        ignore_other: leave out what is no linear module of U-Net or text encoder, as convolutions.
    """

    base: str
    adapters: list[str]
    prompt: str
    method: Method | None = None
    scales: list[float] | None = None
    triggers: list[str] | None = None
    text: TextMode = "merged"
    images: int = 4
    out: Path = Path("composed.png")
    export: Path | None = None
    ignore_other: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise ConfigError(f"images: expected at least 1, got {self.images}")
