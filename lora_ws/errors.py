"""The one family of exceptions: each says what was expected, what came, and what to do."""

import pkgutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

REASONS = {
    "missing": "there is no such file",
    "not-a-file": "a folder, pipe, socket or device, which is not opened",
    "pickle": "a pickled file, which can run code when opened",
    "archive": "files packed into one, which is not unpacked",
    "empty": "nothing in it",
    "lfs-pointer": "a Git LFS pointer instead of the file it stands for",
    "html": "a web page instead of a file",
    "unreadable": "not safetensors, or damaged",
    "truncated": "shorter than its header promises",
    "trailing": "longer than its header promises",
    "header": "a header that breaks the format's rules",
    "layout": "tensors that overlap, leave holes or do not fit their shapes",
    "dtype": "numbers of a type that is not read",
    "too-large": "above a limit on header, tensors, names, shapes, rank or bytes",
    "not-finite": "NaN or infinite values",
    "incomplete": "a module lacks one of its tensors",
    "shape": "tensors of a module that do not fit each other",
    "twice": "a module named a second time",
    "config": "an adapter_config.json or metadata that cannot be used",
    "not-an-adapter": "no tensors of an adapter",
    "unmapped": "too many modules of a kind or name that is not known",
    "needs-base": "an update that depends on the base model's weights",
    "method": "a method of adaptation that is not read",
    "foreign": "an adapter of another base model, or without what is asked of it",
    "failed": "reading it failed in a way that was not foreseen, or ended its process",
    "remote": "a server that did not send what was asked for",
}


def printable(text: str) -> str:
    r"""Escape what a terminal would act on, or not show: control and format characters, odd spaces.

    Example:
        >>> printable("unet.\x1b[2J\u202elayer\n")
        'unet.\\x1b[2J\\u202elayer\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(text: str) -> str:
    r"""A name out of a file, fit for a message: one line, no control characters, not long.

    Example:
        >>> shown("unet.\x1b[2Jlayer")
        '`unet.\\x1b[2Jlayer`'
    """
    cut = text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"
    return f"`{printable(cut)}`"


class LoraWsError(Exception):
    """Base of every error this library raises on purpose; the CLI prints it as one line.

    Example:
        >>> import lora_ws
        >>> try:
        ...     lora_ws.load("lora-ws-mimi")
        ... except LoraWsError as error:
        ...     print(type(error).__name__, error.exit_code)
        NotAvailableError 2
    """

    exit_code = 2


class ConfigError(LoraWsError, ValueError):
    """A flag, YAML key or constructor argument cannot be used."""


class LayoutError(LoraWsError, ValueError):
    """Weights do not have the layout they are said to have."""


class AdapterError(LoraWsError, ValueError):
    """An adapter file cannot be read as an adapter, or not trusted.

    Args:
        message: what was expected, what came, what to do; names the file.
        reason: the same in one word for machines, one of `REASONS`.
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        # Words of a stranger's file stand in it.
        super().__init__(printable(message))
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Errors cross from worker processes; the default would lose the reason.
        return type(self), (str(self.args[0]), self.reason)


class DataError(LoraWsError, ValueError):
    """A collection, or a row of one, is not what its schema says."""


class TrainingError(LoraWsError, RuntimeError):
    """Training ran and failed."""

    exit_code = 1


class NotAvailableError(LoraWsError, FileNotFoundError):
    """Something named is neither on this machine nor reachable from it."""

    def __str__(self) -> str:
        # FileNotFoundError formats errno pairs; a message is all there is here.
        return str(self.args[0]) if self.args else ""


class DeprecatedName(FutureWarning):
    """A key, flag or name that goes with the next release."""


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Refuse a number that is not in a range; NaN is in none.

    Raises:
        ConfigError: it is not.

    Example:
        >>> check_range("steps", 1001, 1, 1000)
        Traceback (most recent call last):
        ...
        lora_ws.errors.ConfigError: steps: expected 1 to 1000, got 1001
    """
    if not least <= value <= most:
        raise ConfigError(f"{name}: expected {least:g} to {most:g}, got {value:.10g}")


def deprecated(old: str, new: str) -> None:
    """Warn that a key, flag or name goes with the next release."""
    warnings.warn(
        f"`{old}` is deprecated and goes with the next release; use `{new}`",
        DeprecatedName,
        stacklevel=3,
    )


class Notice(UserWarning):
    """Something that was not used or left out, which whoever gave it should know."""


def notice(message: str) -> None:
    """Say in one line what was not used or left out."""
    warnings.warn(printable(message), Notice, stacklevel=3)


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module that answers to old names for one release.

    Args:
        module: its ``__name__``.
        names: old name -> where it is now, as "package.module:name".

    Example:
        >>> get = old_names("lora_ws.adapters", {"Place": "lora_ws.adapters:AdapterRef"})
        >>> get("Places")
        Traceback (most recent call last):
        AttributeError: module `lora_ws.adapters` has no attribute `Places`
    """

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module `{module}` has no attribute `{name}`")
        deprecated(f"{module}.{name}", names[name].replace(":", "."))
        return pkgutil.resolve_name(names[name])

    return look_up
