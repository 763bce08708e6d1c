"""A file, local or on the Hub, becomes one `Adapter`: factors, effective scale, origin.

The header is checked and sorted into modules before a single weight is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np

from lora_ws.adapters.adapter import FLOAT32_MAX, Adapter, Module, ProductModule, check_finite
from lora_ws.adapters.bases import Base, detect_base
from lora_ws.adapters.header import LIMITS, Header, Limits, read_header
from lora_ws.adapters.locate import PEFT_WEIGHTS, AdapterRef, settings_beside
from lora_ws.adapters.methods import factors
from lora_ws.adapters.pickled import convert_pickle
from lora_ws.adapters.scale import ScaleRules, scale_rules
from lora_ws.adapters.settings import NO_CONFIGS, Configs, read_configs
from lora_ws.adapters.source import LocalSource, Source
from lora_ws.adapters.structure import Entry, Structure, check_budget, check_complete, structure_of
from lora_ws.adapters.tensors import read_tensors
from lora_ws.errors import AdapterError, shown

# Of structures, which many files share.
_BASES: WeakKeyDictionary[Structure, Base] = WeakKeyDictionary()
# Methods whose factors are the file's own matrices.
PLAIN = ("lora", "locon")


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A file whose header has been checked; none of its weights is read yet.

    It stays open until it is closed, by a ``with`` or with the last reference to it.

    Attributes:
        source: of the bytes.
        header: of the file.
        structure: the modules that it promises.
        config: text of the adapter_config.json beside it, or None.
        configs: PEFT's settings, there or in the header.

    Example:
        >>> from importlib.resources import files
        >>> file = files("lora_ws") / "_assets/digit_testbed/seven.safetensors"
        >>> with open_adapter(file) as opened:
        ...     part = opened.read(["*.attn2.to_v"])
        >>> len(part.modules)
        7
    """

    source: Source
    header: Header
    structure: Structure
    config: str | None = None
    configs: Configs = NO_CONFIGS

    @classmethod
    def of(
        cls, source: Source, config: str | None = None, limits: Limits = LIMITS
    ) -> "AdapterFile":
        """Check a header.

        Raises:
            AdapterError: damaged, not safetensors, no adapter of a kind that is read, or one that
                takes too much.
        """
        header = read_header(source, limits)
        configs = read_configs(header.metadata, config, source.name)
        shapes = {key: info.shape for key, info in header.tensors.items()}
        found = structure_of(shapes, source.name)
        check_complete(found, source.name)
        check_budget(found, limits, source.name)
        _check_kernels(found, configs, source.name)
        return cls(source, header, found, config, configs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    @cached_property
    def base(self) -> Base:
        """The base model, by shapes."""
        found = _BASES.get(self.structure)
        if found is None:
            found = _BASES[self.structure] = detect_base(self.structure.entries)
        return found

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self.source.bytes_read + len(self.config or "")

    def read(self, only: Sequence[str] | None = None) -> Adapter:
        """Read the weights.

        Args:
            only: modules of the denoiser to read, see `read_adapter`; None reads all.

        Raises:
            AdapterError: it has none of them, or an update that float32 cannot hold.
        """
        source = self.source
        entries = self.structure.choose(None if only is None else tuple(only))
        if not entries:
            raise AdapterError(
                f"{source.name}: has none of the modules asked for ({', '.join(only or ())})",
                "foreign",
            )
        tensors = read_tensors(source, self.header, chain(*(entry.needed for entry in entries)))
        paths = (entry.path for entry in entries)
        rules = scale_rules(self.configs, source.name, paths)
        modules: dict[str, Module] = {}
        # What overflows is found out by `check_finite`.
        with np.errstate(over="ignore", invalid="ignore"):
            for entry in entries:
                for module in _modules(entry, tensors, rules, source.name):
                    if not _is_small(module, tensors.norm):
                        check_finite(module, source.name)
                    modules[module.name] = module
        metadata = self.header.metadata
        # A hash takes all bytes, which is what a part is read to avoid.
        sha256 = source.sha256 or "" if only is None else ""
        unread = self.structure.unread
        return Adapter(modules, source.name, sha256, metadata, unread, source.revision)


def open_adapter(handle: str | Path | AdapterRef, *, limits: Limits = LIMITS) -> AdapterFile:
    """Check the header of an adapter file.

    Args:
        handle: as for `read_adapter`.
        limits: on what a file may be.

    Raises:
        AdapterError: as `read_adapter`, but for its weights.

    Example:
        >>> from importlib.resources import files
        >>> file = files("lora_ws") / "_assets/digit_testbed/seven.safetensors"
        >>> with open_adapter(file) as opened:
        ...     opened.base.name
        'unknown U-Net with a context of 48'
    """
    ref = handle if isinstance(handle, AdapterRef) else AdapterRef.parse(handle)
    return AdapterFile.of(*ref.open(), limits)


def open_pickled(
    handle: str | Path | AdapterRef, folder: Path, *, limits: Limits = LIMITS
) -> AdapterFile:
    """Check a pickled adapter, converted by `convert_pickle` in a process of its own.

    Args:
        handle: a file on this machine, or a PEFT folder with ``adapter_model.bin``.
        folder: where the safetensors file is written; keep it until the weights are read.
        limits: on what that file may be.

    Raises:
        AdapterError: as `convert_pickle` and `open_adapter`.
    """
    ref = handle if isinstance(handle, AdapterRef) else AdapterRef.parse(handle)
    file = ref.file()
    # Messages are about the file that the user knows.
    source = LocalSource(convert_pickle(file, folder / PEFT_WEIGHTS), str(file))
    return AdapterFile.of(source, settings_beside(file), limits)


def read_adapter(
    handle: str | Path | AdapterRef, *, only: Sequence[str] | None = None, limits: Limits = LIMITS
) -> Adapter:
    """Read one adapter.

    Args:
        handle: a ``.safetensors`` file, a PEFT folder with its ``adapter_config.json``, or
            ``hub:owner/name/file.safetensors``, with ``@revision`` behind it.
        only: read these modules of the denoiser alone, by path, ``*`` standing for anything
            (``*.attn2.to_v``); None reads all.
        limits: on what a file may be.

    Raises:
        AdapterError: the file is missing, damaged, not safetensors, holds no adapter, or values
            that are not finite. The message names the file, `reason` says which in a word.
        NotAvailableError: the Hub cannot be reached, or has no such repository or revision.

    Example:
        >>> from importlib.resources import files
        >>> file = files("lora_ws") / "_assets/digit_testbed/seven.safetensors"
        >>> adapter = read_adapter(file, only=["*.attn2.to_v"])
        >>> len(adapter.modules), adapter.layout.size
        (7, 2496)
    """
    with open_adapter(handle, limits=limits) as file:
        return file.read(only)


def _check_kernels(found: Structure, configs: Configs, file: str) -> None:
    """Refuse what PEFT multiplies in another order than LyCORIS, from which it took the method."""
    if all(one.get("peft_type") != "LOKR" for one in configs.found.values()):
        return
    for entry in found.entries:
        if len(entry.form.kernel) == 1 and "lokr_w2" in entry.keys:
            raise AdapterError(
                f"{file}: {shown(entry.path)} is LoKr of a convolution over one axis, whose whole "
                "matrix PEFT multiplies in an order of its own; it is not read",
                "method",
            )


def _is_small(module: Module, norm: float) -> bool:
    """Whether the size of all that was read rules out that an update is beyond float32."""
    size = max(1.0, norm)
    return module.method in PLAIN and max(1.0, abs(module.scale)) * size * size <= FLOAT32_MAX


def _modules(
    entry: Entry, tensors: dict[str, np.ndarray], rules: ScaleRules, file: str
) -> Iterator[Module]:
    form, path = entry.form, entry.path
    alpha = tensors[entry.keys["alpha"]] if "alpha" in entry.keys else None
    if alpha is not None and alpha.size != 1:
        raise AdapterError(
            f"{file}: expected one number as alpha of `{path}`, got shape {alpha.shape}",
            "shape",
        )
    # A Kronecker product of two whole matrices has no rank to divide alpha by.
    stated = None if alpha is None else alpha.item()
    value, said = rules.of(entry.component, path, form.rank, stated)
    down, up = factors(form, {role: tensors[entry.keys[role]] for role in form.roles})
    for part in entry.parts:
        whole = len(entry.parts) == 1 and len(part.rows) == 1
        place = entry.component, part.path, form.method
        rest = value, said, form.kernel, entry.needs_base
        if isinstance(down, np.ndarray) and isinstance(up, np.ndarray):
            rows = up if whole else np.concatenate([up[rows] for rows in part.rows])
            yield Module(*place, down, rows, *rest)
        else:
            assert not isinstance(down, np.ndarray)
            assert not isinstance(up, np.ndarray)
            yield ProductModule(*place, down, up if whole else up.take(part.rows), *rest)
