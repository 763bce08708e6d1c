"""Adapters inside a running diffusion model: every sample of a batch its own mixture.

Names are loaded on first use: `bank` needs torch alone; what builds, samples and composes needs the
`diffusion` extra.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ws.diffusion.hooks import compose
    from lora_ws.diffusion.methods import Composite, Merge, Regions, Schedule, Switch
    from lora_ws.diffusion.stack import AdapterStack

_HOME_OF = {
    "AdapterStack": "stack",
    "Composite": "methods",
    "Merge": "methods",
    "Regions": "methods",
    "Schedule": "methods",
    "Switch": "methods",
    "compose": "hooks",
}
__all__ = ["AdapterStack", "Composite", "Merge", "Regions", "Schedule", "Switch", "compose"]
# Old names, kept for one release.
_RENAMED = {"Stack": "AdapterStack"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"`{name}` is `{new}` now", DeprecationWarning, stacklevel=2)
        return __getattr__(new)
    if name not in _HOME_OF:
        raise AttributeError(f"module `lora_ws.diffusion` has no attribute `{name}`")
    return getattr(importlib.import_module(f"lora_ws.diffusion.{_HOME_OF[name]}"), name)
