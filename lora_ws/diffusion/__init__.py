"""Adapters inside a running diffusion model: every sample of a batch its own mixture.

Names are loaded on first use: `bank` needs torch alone; what builds, samples and composes needs the
`diffusion` extra.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_ws.errors import old_names

if TYPE_CHECKING:
    from lora_ws.diffusion.hooks import compose
    from lora_ws.diffusion.methods import Composite, Merge, Regions, Schedule, Switch
    from lora_ws.diffusion.stack import AdapterStack
    from lora_ws.diffusion.turns import AdaptiveSwitch

_HOME_OF = {
    "AdapterStack": "stack",
    "AdaptiveSwitch": "turns",
    "Composite": "methods",
    "Merge": "methods",
    "Regions": "methods",
    "Schedule": "methods",
    "Switch": "methods",
    "compose": "hooks",
}
__all__ = [
    "AdapterStack",
    "AdaptiveSwitch",
    "Composite",
    "Merge",
    "Regions",
    "Schedule",
    "Switch",
    "compose",
]
_old_name = old_names(__name__, {"Stack": "lora_ws.diffusion:AdapterStack"})


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        return _old_name(name)
    return getattr(importlib.import_module(f"lora_ws.diffusion.{_HOME_OF[name]}"), name)
