"""PEFT's settings beside a file or inside it: which kind of adapter it is, and what scales it.

Kinds other than those of `READ`, and options of LoRA that change what its matrices mean, are
refused by name: taken for plain LoRA they would give another update than the file's.
"""

import json
import math
from collections.abc import Mapping
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
READ = ("LORA", "ADALORA", "LOHA", "LOKR")
# Of AdaLoRA, whose divisor is the rank that it began with, and PEFT's guard against none.
ADALORA_RANK, ADALORA_GUARD = 12, 1e-5
# What turns or scales the base model's weights instead of adding to them.
ON_BASE = (
    *("ADAMSS", "BOFT", "FROD", "GLORA", "HIRA", "HRA", "IA3", "LN_TUNING", "OFT", "OSF"),
    *("DELORA", "DEFT", "PEANUT", "PSOFT", "ROAD", "SUPERTUNING", "TINYLORA"),
)
# Starts that leave the base model as it is. All others take from it what they put into the factors.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Options of LoRA under which the product of its matrices is not what is added to the weights.
OPTIONS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
    *("monteclora_config", "target_parameters", "use_bdlora", "use_qalora"),
)


@dataclass(frozen=True)
class Configs:
    """Settings of PEFT as they were written down.

    Attributes:
        found: component -> settings; "" is for all.
        place: where they stand; empty where there are none.
    """

    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    place: str = ""


NO_CONFIGS = Configs()


class Settings(NamedTuple):
    """What PEFT's settings say of scales.

    Attributes:
        alpha: of modules that fit no pattern; None where nothing is said.
        alphas: patterns of modules, with the alpha of each; the first that fits counts.
        rslora: alpha is divided by the root of the rank.
        rank: what alpha is divided by, where that is not the rank of the matrices.
        ranks: patterns of modules, with the same of each.
    """

    alpha: float | None = None
    alphas: tuple[tuple[Pattern, float], ...] = ()
    rslora: bool = False
    rank: float | None = None
    ranks: tuple[tuple[Pattern, float], ...] = ()

    def alpha_of(self, path: str) -> float | None:
        """Alpha of a module."""
        return next((a for pattern, a in self.alphas if pattern.fits(path)), self.alpha)

    def divisor(self, path: str, rank: int) -> float:
        """What the alpha of a module is divided by.

        Args:
            path: of the module.
            rank: of its matrices; 0 where they are whole.
        """
        other = next((r for pattern, r in self.ranks if pattern.fits(path)), self.rank)
        if other is not None:
            return other
        return math.sqrt(rank) if self.rslora else float(rank)


def read_configs(metadata: Mapping[str, str], config: str | None, file: str) -> Configs:
    """Find PEFT's settings, and refuse kinds of adapters that are not read.

    Args:
        metadata: of the file's header.
        config: text of the adapter_config.json beside it, which counts before the header.
        file: what errors call it.

    Raises:
        AdapterError: the text cannot be used (``config``), the update depends on the base model's
            weights (``needs-base``), or it is of another kind (``method``).

    Example:
        >>> read_configs({}, '{"peft_type": "LORA", "init_lora_weights": "pissa"}', "f")
        Traceback (most recent call last):
        lora_ws.errors.AdapterError: f: adapter_config.json: `init_lora_weights` is `pissa`, ...
    """
    if config is not None:
        configs = Configs({"": _parse(config, f"{file}: {PEFT_CONFIG}")}, PEFT_CONFIG)
    elif HEADER_CONFIG in metadata:
        found: dict[str, dict[str, Any]] = {}
        for key, value in _parse(metadata[HEADER_CONFIG], f"{file}: {HEADER_CONFIG}").items():
            component, dot, name = key.partition(".")
            found.setdefault(component if dot else "", {})[name if dot else key] = value
        configs = Configs(found, HEADER_CONFIG)
    else:
        return NO_CONFIGS
    for one in configs.found.values():
        _check_kind(one, f"{file}: {configs.place}")
    return configs


def read_settings(config: Mapping[str, Any], characters: int, origin: str) -> Settings:
    """Take the scales out of settings.

    Args:
        config: of one component.
        characters: of all paths that will be asked for: with them grows what patterns cost.
        origin: what errors call it.

    Raises:
        AdapterError: they cannot be used, or have patterns that are not read, or too many.
    """
    kind = config.get("peft_type", "LORA")
    alphas = () if kind == "ADALORA" else _patterns(config, "alpha_pattern", origin)
    ranks = _patterns(config, "rank_pattern", origin) if kind == "LOKR" else ()
    looks = characters * sum(pattern.pieces for pattern, _ in (*alphas, *ranks))
    if looks > MAX_LOOKS:
        raise AdapterError(
            f"{origin}: its {len(alphas) + len(ranks)} patterns in `alpha_pattern` take too long "
            "to match",
            "config",
        )
    name = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"
    alpha = _number(name, config[name], origin) if name in config else None
    rank = None
    if kind == "LOKR":
        rank = _rank("r", config.get("r"), origin)
    if kind == "ADALORA":
        begun = _rank("init_r", config.get("init_r", ADALORA_RANK), origin)
        rank = begun + ADALORA_GUARD
        alpha = alpha if alpha is None or alpha > 0 else begun
    rslora = kind == "LORA" and bool(config.get("use_rslora"))
    return Settings(alpha, alphas, rslora, rank, ranks)


def _check_kind(config: Mapping[str, Any], origin: str) -> None:
    kind, start = config.get("peft_type") or "LORA", config.get("init_lora_weights")
    if kind not in READ:
        why = "its update depends on the base model's weights" if kind in ON_BASE else "not read"
        raise AdapterError(
            f"{origin}: expected `peft_type` to be one of {', '.join(READ)}, got "
            f"{shown(str(kind))}: {why}; merge it with PEFT",
            "needs-base" if kind in ON_BASE else "method",
        )
    if not any(start is known or start == known for known in STARTS):
        raise AdapterError(
            f"{origin}: `init_lora_weights` is {shown(str(start))}, which changed the base model's "
            "weights too, so that the update depends on them; save it as plain LoRA with PEFT's "
            "`path_initial_model_for_weight_conversion`",
            "needs-base",
        )
    if odd := next((name for name in OPTIONS if config.get(name)), None):
        raise AdapterError(
            f"{origin}: `{odd}` is set, under which the update is not the product of the "
            "matrices; it is not read",
            "method",
        )


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{origin}: not readable as JSON ({error})", "config") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise AdapterError(f"{origin}: expected a JSON object, got {kind}", "config")
    return found


def _patterns(
    config: Mapping[str, Any], name: str, origin: str
) -> tuple[tuple[Pattern, float], ...]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise AdapterError(f"{origin}: expected `{name}` to be an object", "config")
    number = _rank if name == "rank_pattern" else _number
    return tuple(
        (_pattern(text, name, origin), number(text, value, origin)) for text, value in found.items()
    )


def _rank(name: str, value: Any, origin: str) -> float:
    rank = _number(name, value, origin)
    if rank <= 0:
        raise AdapterError(
            f"{origin}: expected {shown(name)} to be above 0, got {rank:g}", "config"
        )
    return rank


def _number(name: str, value: Any, origin: str) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise AdapterError(
            f"{origin}: expected {shown(name)} to be a number, got {shown(repr(value))}", "config"
        )
    return number


def _pattern(text: str, name: str, origin: str) -> Pattern:
    try:
        return parse_pattern(text)
    except ValueError as error:
        raise AdapterError(
            f"{origin}: `{name}` holds {shown(text)}, a regular expression that is not read "
            f"({shown(str(error))[1:-1]}); without it the scale would be a guess",
            "config",
        ) from error
