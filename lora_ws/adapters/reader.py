"""A file, local or on the Hub, becomes one `Adapter`: factors, effective scale, origin.

The header is checked and sorted into modules before a single weight is read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.header import LIMITS, Header, Limits, read_header
from lora_ws.adapters.methods import factors
from lora_ws.adapters.outline import Entry, Outline, check_complete, outline
from lora_ws.adapters.scale import PEFT_CONFIG, ScaleRules, read_rules
from lora_ws.adapters.source import LocalSource, Source
from lora_ws.adapters.tensors import read_tensors
from lora_ws.errors import AdapterError

PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Longer ones are no settings.
MAX_CONFIG_BYTES = 1 << 20


def read_adapter(
    path: str | Path, *, only: Sequence[str] | None = None, limits: Limits = LIMITS
) -> Adapter:
    """Read one adapter.

    Args:
        path: a ``.safetensors`` file, or a PEFT folder with its ``adapter_config.json``.
        only: read these modules of the denoiser alone, by path, ``*`` standing for anything
            (``*.attn2.to_v``); None reads all.
        limits: on what a file may be.

    Raises:
        AdapterError: the file is missing, damaged, not safetensors, holds no adapter, or values
            that are not finite. The message names the file, `reason` says which in a word.
    """
    file, config = locate(path)
    return read_source(LocalSource(file), config, only=only, limits=limits)


def locate(path: str | Path) -> tuple[Path, str | None]:
    """The file of weights, and the text of the adapter_config.json beside it.

    Raises:
        AdapterError: there is none, or it is a pickle.
    """
    path = Path(path)
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise AdapterError(
            f"{path}: expected a .safetensors file or a PEFT folder, found neither", "missing"
        )
    if file.suffix != ".safetensors":
        raise AdapterError(
            f"{file}: expected a .safetensors file, got `{file.suffix or 'no suffix'}`; "
            "pickled files can run code when opened and are refused: convert the file first",
            "pickle",
        )
    beside = file.with_name(PEFT_CONFIG)
    if file.name != PEFT_WEIGHTS or not beside.is_file():
        return file, None
    if beside.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{beside}: expected settings, got {beside.stat().st_size} bytes", "config"
        )
    return file, beside.read_text(errors="replace")


def read_source(
    source: Source,
    config: str | None = None,
    *,
    only: Sequence[str] | None = None,
    limits: Limits = LIMITS,
) -> Adapter:
    """Read one adapter from wherever its bytes are.

    Args:
        source: of the bytes.
        config: text of an adapter_config.json.
        only: modules of the denoiser to read; None reads all.
        limits: on what a file may be.

    Raises:
        AdapterError: as `read_adapter`.
    """
    header = read_header(source, limits)
    found = outline_of(header, source.name)
    check_complete(found, source.name)
    entries = found.choose(None if only is None else tuple(only))
    if not entries:
        raise AdapterError(
            f"{source.name}: has none of the modules asked for ({', '.join(only or ())})", "foreign"
        )
    keys = [key for entry in entries for role, key in entry.keys.items() if _is_read(role)]
    tensors = read_tensors(source, header, keys)
    rules = read_rules(header.metadata, config, source.name)
    modules: dict[str, Module] = {}
    for entry in entries:
        modules |= {m.name: m for m in _modules(entry, tensors, rules, source.name)}
    others = (*found.other_keys, *found.unmapped)
    return Adapter(
        modules, source.name, source.sha256 or "", header.metadata, others, source.revision
    )


def outline_of(header: Header, name: str) -> Outline:
    """The modules that a checked header promises."""
    return outline({key: info.shape for key, info in header.tensors.items()}, name)


def _modules(
    entry: Entry, tensors: dict[str, np.ndarray], rules: ScaleRules, file: str
) -> list[Module]:
    roles = {role: tensors[key] for role, key in entry.keys.items() if key in tensors}
    alpha = roles.pop("alpha", None)
    if alpha is not None and alpha.size != 1:
        raise AdapterError(
            f"{file}: expected one number as alpha of `{entry.path}`, got shape {alpha.shape}",
            "shape",
        )
    form = entry.form
    # A Kronecker product of two whole matrices has no rank to divide alpha by.
    scale = rules.of(
        entry.component, entry.path, form.rank, None if alpha is None else float(alpha.item())
    )
    down, up = factors(form, roles)
    found = []
    for part in entry.parts:
        whole = len(entry.parts) == 1 and len(part.rows) == 1
        rows = up if whole else np.concatenate([up[rows] for rows in part.rows])
        found.append(
            Module(
                entry.component,
                part.path,
                form.method,
                down,
                rows,
                *scale,
                form.kernel,
                entry.needs_base,
            )
        )
    return found


def _is_read(role: str) -> bool:
    return (
        role == "alpha" or role in ("down", "up", "mid", "diff") or role[:5] in ("hada_", "lokr_")
    )
