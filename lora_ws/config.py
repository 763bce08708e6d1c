"""Specs are data: one signature is the Python API, the YAML schema and the command-line flags.

Everything that knows jsonargparse is here. Order of precedence: default < YAML file < flag.
"""

import dataclasses
import difflib
import importlib
import importlib.resources
import inspect
import os
import re
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import yaml
from jsonargparse import ArgumentParser

from lora_ws.errors import ConfigError

T = TypeVar("T")
SpecFolder = Literal["datasets", "training", "eval"]


def cache_dir() -> Path:
    """Folder for stores made by `lora_ws.load`: ``LORA_WS_CACHE``, else the user's cache folder."""
    if "LORA_WS_CACHE" in os.environ:
        return Path(os.environ["LORA_WS_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lora_ws"


def spec_root(folder: SpecFolder) -> Path:
    """Where the YAML files of a spec folder are: the repository's, else the installed copy."""
    package = Path(str(importlib.resources.files("lora_ws")))
    # An editable install may leave a stale packaged copy behind, so the repository comes first.
    if (package.parent / "pyproject.toml").is_file() and (package.parent / folder).is_dir():
        return package.parent / folder
    return package / "_specs" / folder


def spec_files(folder: SpecFolder) -> dict[str, Path]:
    """All specs of a folder: name (path inside it without ``.yaml``) -> file."""
    root = spec_root(folder)
    files = sorted(root.rglob("*.yaml"))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def load_spec(target: Callable[..., T], path: str | Path) -> T:
    """Build ``target`` (a dataclass or function) from a YAML file; unknown keys are refused.

    Raises:
        ConfigError: the file is missing, or a key or value does not fit; the message names it.
    """
    try:
        return parse(target, ["--config", str(path)], prog=Path(path).name)()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(target: Callable[..., T], args: Sequence[str], prog: str) -> Callable[[], T]:
    """Read flags (and ``--config`` files) for the parameters of ``target``.

    A function whose only parameter is a dataclass takes the dataclass's fields as its flags;
    positional-only parameters are positional on the command line too.

    Returns:
        A call without arguments that runs ``target`` with what was read.

    Raises:
        ConfigError: a flag or key is unknown (the nearest valid one is named) or its value does
            not fit.
    """
    spec_type = _spec_type(target)
    positional, keywords = _positional(target)
    parser = _Parser(prog=prog, exit_on_error=False, description=_summary(target))
    parser.add_argument("--config", action="config", help="YAML file with any of the flags below")
    for parameter in positional:
        repeated = parameter.annotation == list[str]
        parser.add_argument(
            parameter.name,
            type=str,
            nargs="+" if repeated else None,
            help=_argument_help(target, parameter.name),
        )
    lists = {p.name: kind for p in keywords if (kind := _list_of(p.annotation))}
    for parameter in keywords if lists else []:
        if kind := lists.get(parameter.name):
            empty = parameter.default is inspect.Parameter.empty
            parser.add_argument(
                f"--{parameter.name}",
                type=kind,
                nargs="+",
                required=empty,
                default=None if empty else parameter.default,
                help=_argument_help(target, parameter.name),
            )
    if spec_type:
        parser.add_class_arguments(spec_type, None, as_group=False, sub_configs=False)
    elif isinstance(target, type):
        parser.add_class_arguments(target, None, as_group=False, sub_configs=False)
    elif keywords:
        skip: set[str | int] = {*lists, *(parameter.name for parameter in positional)}
        parser.add_function_arguments(target, None, as_group=False, skip=skip)
    try:
        values = vars(parser.instantiate(parser.parse_args([_underscored(a) for a in args])))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_explain(error, parser)) from error
    values.pop("config", None)
    if spec_type:
        spec = _build(spec_type, values)
        return lambda: target(spec)
    first = [values.pop(parameter.name) for parameter in positional]
    return lambda: _build(target, values, first)


def to_plain(value: Any) -> Any:
    """Turn a spec into plain data that YAML can hold and `load_spec` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_plain(getattr(value, name)) for name in names}
    if hasattr(value, "get_params") and not isinstance(value, type):
        params = {name: to_plain(p) for name, p in value.get_params(deep=False).items()}
        # A layout belongs to the data, not to the experiment.
        params.pop("layout", None)
        return {"class_path": class_path(value), "init_args": params}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def dump_yaml(value: Any, path: Path) -> None:
    """Write plain data as YAML, keys in the order given."""
    path.write_text(yaml.safe_dump(to_plain(value), sort_keys=False, width=100))


def class_path(value: Any) -> str:
    """Dotted path of an object's class, the shortest that imports."""
    kind = type(value)
    parent = kind.__module__.rpartition(".")[0]
    if parent and getattr(importlib.import_module(parent), kind.__name__, None) is kind:
        return f"{parent}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


# Names that an error lists in full.
FEW = 16


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``, did you mean `x`?`` for the closest known word, or name all if they are few."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f", did you mean `{close[0]}`?"
    return f"; expected one of {', '.join(known)}" if 0 < len(known) <= FEW else "."


def parse_shard(text: str) -> tuple[int, int]:
    """Read "i/n" as i and n."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ConfigError(f"shard: expected i/n with 0 <= i < n, such as 0/4, got `{text}`")
    return int(first), int(second)


class _Parser(ArgumentParser):
    """Lists our own classes as choices, not all of scikit-learn's that happen to be imported."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        def ours(match: re.Match[str]) -> str:
            names = [n for n in re.findall(r"[\w.]+", match[1]) if n.startswith("lora_ws.")]
            short = sorted({name.rpartition(".")[2] for name in names} - {"Featurizer"})
            return f"one of {', '.join(short)}, or any by dotted path)"

        return re.sub(r"known\s+subclasses:([^)]*)\)", ours, super().format_help(*args, **kwargs))


def _build(target: Callable[..., T], values: dict[str, Any], first: Sequence[Any] = ()) -> T:
    return target(*first, **values)


def _spec_type(target: Callable[..., Any]) -> type | None:
    if isinstance(target, type):
        return None
    parameters = list(inspect.signature(target).parameters.values())
    if len(parameters) == 1 and dataclasses.is_dataclass(parameters[0].annotation):
        return parameters[0].annotation  # type: ignore[return-value]
    return None


def _positional(
    target: Callable[..., Any],
) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    parameters = list(inspect.signature(target).parameters.values())
    first = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    return first, [p for p in parameters if p not in first]


def _list_of(annotation: Any) -> type | None:
    """What a flag that takes several words, ``--adapters a b``, is a list of."""
    kinds = (annotation, *get_args(annotation))
    return next((k for k in (str, float) if list[k] in kinds), None)


def _summary(target: Callable[..., Any]) -> str:
    return (inspect.getdoc(target) or "").partition("\n\n")[0]


def _argument_help(target: Callable[..., Any], name: str) -> str:
    match = re.search(rf"^\s+{name}: (.+)$", inspect.getdoc(target) or "", re.MULTILINE)
    return match.group(1) if match else ""


def _underscored(arg: str) -> str:
    """Flags may be typed with dashes: --on-error is --on_error."""
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if arg.startswith("--") else arg


def _explain(error: Exception, parser: ArgumentParser) -> str:
    """One line for a parser's error, with the nearest valid name if a name was wrong."""
    text = str(error)
    flags = sorted({o for a in parser._actions for o in a.option_strings if o.startswith("--")})
    keys = sorted({part for flag in flags for part in [flag[2:], flag[2:].rpartition(".")[2]]})
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        flag = match.group(1).partition("=")[0]
        return f"unknown flag `{flag}`{nearest(flag, flags)}"
    match = re.search(r"[Oo]ption '([^']+)' is not accepted", text) or re.search(
        r"does not accept option '([^']+)'", text
    )
    if match:
        owner = re.search(r"class_path '([^']+)'", text)
        known = _init_names(owner.group(1)) if owner else keys
        of = f" of {owner.group(1).rpartition('.')[2]}" if owner else ""
        return f"unknown option `{match.group(1)}`{of}{nearest(match.group(1), known)}"
    if match := re.search(
        r'key "([^"]+)":\s+Expected an? <class \'(\w+)\'>. Got value: (.*)', text
    ):
        return f"--{match[1]}: expected {match[2]}, got `{match[3]}`"
    match = re.search(
        r'key "([^"]+)":.*?Literal\[(.*?)\].*(?:Given|Got) value: (\S+)', text, re.DOTALL
    )
    if match and "featurizer" not in match[1]:
        return f"--{match[1]}: expected {match[2].replace(chr(39), '')}, got `{match[3]}`"
    if match := re.search(r'key "featurizer"', text):
        given = re.search(r"Given value: (\S+)", text) or re.search(r"Got value: (\S+)", text)
        if given and "Problem with given class_path" not in text:
            return f"--featurizer: no class `{given[1]}`{nearest(given[1], _featurizers())}"
    if match := re.search(r"the following arguments are required: (.+)", text):
        names = match.group(1).split(", ")
        missing = [f"--{name}" if f"--{name}" in flags else name for name in names]
        return f"missing: {', '.join(missing)}"
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _featurizers() -> list[str]:
    rooms = importlib.import_module("lora_ws.featurizers")
    return [name for name in rooms.__all__ if isinstance(getattr(rooms, name), type)]


def _init_names(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return list(inspect.signature(kind).parameters)
