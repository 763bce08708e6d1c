"""Which base model, on which device, in which precision."""

from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A base model, the device that it runs on, and the precision of its numbers.

    Attributes:
        base: digit-sd or tiny-sd (bundled), a diffusers folder, or a repository on the Hub.
        device: auto is cuda or mps where there is one, and cpu otherwise. Noise is drawn on the
            CPU, so images are the same on every device but for rounding.
        dtype: of base model and adapters; half precision for a GPU with little memory.

    Example:
        >>> PipelineSpec(base="digit-sd", dtype="float16")
        PipelineSpec(base='digit-sd', device='auto', dtype='float16')
    """

    base: str
    device: Device = "auto"
    dtype: Precision = "float32"
