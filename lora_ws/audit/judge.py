"""Names of before, for one release; they are in `lora_ws.audit.classify`."""

import warnings
from typing import Any

from lora_ws.audit import classify

_OLD = {
    "judge": classify.classify_files,
    "Judged": classify.FileResult,
    "Finding": classify.Finding,
}


def __getattr__(name: str) -> Any:
    if name not in _OLD:
        raise AttributeError(f"module `lora_ws.audit.judge` has no attribute `{name}`")
    new = _OLD[name]
    message = (
        f"lora_ws.audit.judge.{name} is now lora_ws.audit.classify.{new.__qualname__}; the old "
        "name goes next release"
    )
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return new
