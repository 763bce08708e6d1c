"""The factor of an update: where files hide it, and which of its places counts."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_ws.errors import AdapterError

PEFT_CONFIG = "adapter_config.json"
# Where diffusers keeps the same facts inside a file, keys prefixed with the component's name.
HEADER_CONFIG = "lora_adapter_metadata"


class Scale(NamedTuple):
    """The factor, and where it is said."""

    value: float
    source: str


@dataclass(frozen=True)
class ScaleRules:
    """What a file says of scales beside its alpha tensors.

    Attributes:
        configs: component -> settings of PEFT; "" is for all.
        source: where they stand.
    """

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = ""

    def of(self, component: str, path: str, rank: int, alpha: float | None) -> Scale:
        """The scale of a module: its alpha tensor, else the configuration, else 1.

        Args:
            component: of the module.
            path: of the module.
            rank: by which its alpha counts; 0 where its method has no scale.
            alpha: the number stored beside it; 0 means the rank, as sd-scripts reads it.

        Example:
            >>> ScaleRules().of("unet", "x", rank=4, alpha=2.0)
            Scale(value=0.5, source='alpha tensor')
        """
        if rank == 0:
            return Scale(1.0, "full matrices have none")
        if alpha is not None:
            # LyCORIS with rs_lora stores an alpha that makes this right too.
            return Scale(alpha / rank or 1.0, "alpha tensor")
        config = self.configs.get(component, self.configs.get("", {}))
        alpha = _pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha"))
        if alpha is None:
            return Scale(1.0, "none given, so 1")
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        return Scale(float(alpha) / divisor, self.source)


def read_rules(metadata: Mapping[str, str], config: str | None, file: str) -> ScaleRules:
    """Gather what a file says.

    Args:
        metadata: of its header.
        config: text of the adapter_config.json beside it.
        file: what errors call it.

    Raises:
        AdapterError: the text cannot be used.
    """
    if config is not None:
        origin = f"{file}: {PEFT_CONFIG}"
        return ScaleRules({"": _checked(_parse(config, origin), origin)}, PEFT_CONFIG)
    if HEADER_CONFIG not in metadata:
        return ScaleRules()
    origin = f"{file}: {HEADER_CONFIG}"
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _parse(metadata[HEADER_CONFIG], origin).items():
        component, dot, name = key.partition(".")
        configs.setdefault(component if dot else "", {})[name if dot else key] = value
    checked = {component: _checked(found, origin) for component, found in configs.items()}
    return ScaleRules(checked, HEADER_CONFIG)


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{origin}: not readable as JSON ({error})", "config") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise AdapterError(f"{origin}: expected a JSON object, got {kind}", "config")
    return found


def _checked(config: dict[str, Any], origin: str) -> dict[str, Any]:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{origin}: expected `alpha_pattern` to be an object", "config")
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 0), **patterns}.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not math.isfinite(alpha):
            raise AdapterError(
                f"{origin}: expected `{name}` to be a number, got {alpha!r}", "config"
            )
    return config


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that fits the end of the path, at a dot."""
    for pattern, value in patterns.items():
        # Patterns come from the file: as regular expressions they could run for ever.
        plain = re.escape(pattern.removeprefix("^").removesuffix("$")).replace(r"\\\.", r"\.")
        if re.fullmatch(rf"(.*\.)?({plain})", path):
            return value
    return default
