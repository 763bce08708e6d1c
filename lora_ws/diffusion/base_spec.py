"""Which base model, on which device, in which precision."""

from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["float32", "float16", "bfloat16"]
BUNDLED = ("digit-sd", "tiny-sd")


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A base model, the device that it runs on, and the precision of its numbers.

    Attributes:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, a .safetensors checkpoint, or a
            repository on the Hub; Stable Diffusion 1.x and 2.x, SDXL, SD3 or FLUX.1.
        device: auto is cuda or mps where there is one, and cpu otherwise. Noise is drawn on the
            CPU, so images are the same on every device but for rounding.
        dtype: of base model and adapters; half precision for a GPU with little memory.
        base_config: diffusers folder or repository with the configuration of a .safetensors
            checkpoint; null downloads that of its kind of model, once.

    Example:
        >>> PipelineSpec(base="digit-sd", dtype="float16")
        PipelineSpec(base='digit-sd', device='auto', dtype='float16', base_config=None)
    """

    base: str
    device: Device = "auto"
    dtype: Precision = "float32"
    base_config: str | None = None
