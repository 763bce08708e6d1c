"""Adapters inside a running diffusion model: every sample of a batch its own mixture.

Names are loaded on first use: `bank` needs torch alone; what builds, samples and composes needs the
`diffusion` extra.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ws.diffusion.conductor import compose
    from lora_ws.diffusion.methods import Composite, Merge, Regions, Schedule, Switch
    from lora_ws.diffusion.stack import Stack

_HOME_OF = {
    "compose": "conductor",
    "Composite": "methods",
    "Merge": "methods",
    "Regions": "methods",
    "Schedule": "methods",
    "Stack": "stack",
    "Switch": "methods",
}
__all__ = ["Composite", "Merge", "Regions", "Schedule", "Stack", "Switch", "compose"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module `lora_ws.diffusion` has no attribute `{name}`")
    return getattr(importlib.import_module(f"lora_ws.diffusion.{_HOME_OF[name]}"), name)
