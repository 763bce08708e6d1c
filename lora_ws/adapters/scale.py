"""The factor of an update: where files hide it, and which of its places counts."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_ws.adapters.header import shown
from lora_ws.adapters.patterns import Pattern, parse_pattern
from lora_ws.errors import AdapterError

PEFT_CONFIG = "adapter_config.json"
# Where diffusers keeps the same facts inside a file, keys prefixed with the component's name.
HEADER_CONFIG = "lora_adapter_metadata"
# Looks of patterns at characters of module paths: some ten seconds. A pattern for each module of
# SDXL takes half of it.
MAX_LOOKS = 200_000_000


class Scale(NamedTuple):
    """The factor, and where it is said."""

    value: float
    source: str


class Settings(NamedTuple):
    """What PEFT's settings say of scales.

    Attributes:
        alpha: of modules that fit no pattern; None where nothing is said.
        patterns: of modules, with the alpha of each; the first that fits counts.
        rslora: alpha is divided by the root of the rank.
    """

    alpha: float | None = None
    patterns: tuple[tuple[Pattern, float], ...] = ()
    rslora: bool = False

    def alpha_of(self, path: str) -> float | None:
        """Alpha of a module."""
        return next((a for pattern, a in self.patterns if pattern.fits(path)), self.alpha)


@dataclass(frozen=True)
class ScaleRules:
    """What a file says of scales beside its alpha tensors.

    Attributes:
        configs: component -> settings of PEFT; "" is for all.
        source: where they stand.
    """

    configs: Mapping[str, Settings] = field(default_factory=dict)
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
        settings = self.configs.get(component) or self.configs.get("", Settings())
        alpha = settings.alpha_of(path)
        if alpha is None:
            return Scale(1.0, "none given, so 1")
        return Scale(alpha / (math.sqrt(rank) if settings.rslora else rank), self.source)


def read_rules(
    metadata: Mapping[str, str], config: str | None, file: str, paths: Iterable[str] = ()
) -> ScaleRules:
    """Gather what a file says.

    Args:
        metadata: of its header.
        config: text of the adapter_config.json beside it.
        file: what errors call it.
        paths: modules that will be asked for: with their number grows what patterns cost.

    Raises:
        AdapterError: the text cannot be used, or has patterns that are not read (`parse_pattern`),
            or too many.
    """
    characters = sum(map(len, paths))
    if config is not None:
        origin = f"{file}: {PEFT_CONFIG}"
        return ScaleRules({"": _settings(_parse(config, origin), characters, origin)}, PEFT_CONFIG)
    if HEADER_CONFIG not in metadata:
        return ScaleRules()
    origin = f"{file}: {HEADER_CONFIG}"
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _parse(metadata[HEADER_CONFIG], origin).items():
        component, dot, name = key.partition(".")
        configs.setdefault(component if dot else "", {})[name if dot else key] = value
    checked = {name: _settings(found, characters, origin) for name, found in configs.items()}
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


def _settings(config: Mapping[str, Any], characters: int, origin: str) -> Settings:
    found = config.get("alpha_pattern") or {}
    if not isinstance(found, dict):
        raise AdapterError(f"{origin}: expected `alpha_pattern` to be an object", "config")
    patterns = tuple(
        (_pattern(text, origin), _number(text, alpha, origin)) for text, alpha in found.items()
    )
    looks = characters * sum(pattern.pieces for pattern, _ in patterns)
    if looks > MAX_LOOKS:
        raise AdapterError(
            f"{origin}: its {len(patterns)} patterns in `alpha_pattern` take too long to match",
            "config",
        )
    alpha = None
    if "lora_alpha" in config:
        alpha = _number("lora_alpha", config["lora_alpha"], origin)
    return Settings(alpha, patterns, bool(config.get("use_rslora")))


def _number(name: str, value: Any, origin: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise AdapterError(
            f"{origin}: expected {shown(name)} to be a number, got {value!r}", "config"
        )
    return float(value)


def _pattern(text: str, origin: str) -> Pattern:
    try:
        return parse_pattern(text)
    except ValueError as error:
        raise AdapterError(
            f"{origin}: `alpha_pattern` holds {shown(text)}, a regular expression that is not read "
            f"({shown(str(error))[1:-1]}); without it the scale would be a guess",
            "config",
        ) from error
