"""Specs are data: one signature is the Python API, the YAML schema and the command-line flags.

Everything that knows jsonargparse is here and in `lora_ws.flags`.
Order of precedence: default < YAML file < flag.
"""

import dataclasses
import difflib
import importlib.resources
import inspect
import os
import pkgutil
import re
import textwrap
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
import yaml
from jsonargparse import ArgumentParser

from lora_ws.errors import ConfigError
from lora_ws.flags import (
    Parser,
    choices_of,
    classes_of,
    deprecated_keys,
    import_path,
    prefer_ours,
)

T = TypeVar("T")
# Metadata of a spec's field that earlier versions had: read for one more release, never shown or
# written.
DEPRECATED = {"deprecated": True}
# Names that an error lists in full.
FEW = 16
SpecFolder = Literal["datasets", "training", "eval"]
# What is entered around a call; its parameters are flags too.
Around = Callable[..., AbstractContextManager[None]]


def cache_dir() -> Path:
    """Locate stores made by `lora_ws.load`: ``LORA_WS_CACHE``, else the user's cache folder."""
    if "LORA_WS_CACHE" in os.environ:
        return Path(os.environ["LORA_WS_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lora_ws"


def spec_root(folder: SpecFolder) -> Path:
    """Locate the YAML files of a spec folder: the repository's, else the installed copy."""
    package = Path(str(importlib.resources.files("lora_ws")))
    # An editable install may leave a stale packaged copy behind, so the repository comes first.
    if (package.parent / "pyproject.toml").is_file() and (package.parent / folder).is_dir():
        return package.parent / folder
    return package / "_specs" / folder


def spec_files(folder: SpecFolder) -> dict[str, Path]:
    """List the specs of a folder: name (path inside it without ``.yaml``) -> file."""
    root = spec_root(folder)
    files = sorted(root.rglob("*.yaml"))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def spec_file(folder: SpecFolder, name: str) -> Path:
    """Find a spec of a folder by its name, as in `spec_files`.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    files = spec_files(folder)
    if name not in files:
        raise ConfigError(f"no `{name}` in {folder}/{nearest(name, list(files))}")
    return files[name]


def load_spec(target: Callable[..., T], path: str | Path) -> T:
    """Build ``target`` (a dataclass or function) from a YAML file; unknown keys are refused.

    Raises:
        ConfigError: the file is missing, or a key or value does not fit; the message names it.
    """
    try:
        return _bind(target, _spec_parser(target), ["--config", str(path)])()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(
    target: Callable[..., T],
    args: Sequence[str],
    prog: str,
    example: str = "",
    first: Sequence[str] = (),
    around: Sequence[Around] = (),
) -> Callable[[], T]:
    """Read flags (and ``--config`` files) for the parameters of ``target``.

    A function whose only parameter is a dataclass, positional-only ones aside, takes the
    dataclass's fields as its flags; positional-only parameters are positional on the command line.

    Args:
        target: what to call.
        args: words of the command line.
        prog: name in messages and help.
        example: a command line that its help shows.
        first: flags that its help shows before the others.
        around: what is entered around the call, in this order.

    Returns:
        A call without arguments that runs ``target`` with what was read.

    Raises:
        ConfigError: a flag or key is unknown (the nearest valid one is named) or its value does
            not fit.
    """
    return _bind(target, make_parser(target, prog, example, first, around), args, around)


@cache
def _spec_parser(target: Callable[..., Any]) -> Parser:
    """The parser of a type of files: making one takes longer than reading a file with it."""
    return make_parser(target, prog=target.__name__)


def _bind(
    target: Callable[..., T], parser: Parser, args: Sequence[str], around: Sequence[Around] = ()
) -> Callable[[], T]:
    """The call of ``target`` that these words ask for."""
    spec_type = _spec_type(target)
    try:
        values = vars(parser.instantiate(parser.parse_args([_underscored(a) for a in args])))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_explain(error, parser)) from error
    values.pop("config", None)
    positional = [values.pop(parameter.name) for parameter in _positional(target)[0]]
    entered = [
        (one, {name: values.pop(name) for name in inspect.signature(one).parameters})
        for one in around
    ]
    spec = (spec_type(**values),) if spec_type else ()

    def call() -> T:
        with ExitStack() as stack:
            for one, flags in entered:
                stack.enter_context(one(**flags))
            return target(*positional, *spec, **({} if spec_type else values))

    return call


def make_parser(
    target: Callable[..., Any],
    prog: str,
    example: str = "",
    first: Sequence[str] = (),
    around: Sequence[Around] = (),
) -> Parser:
    """The parser that `parse` uses, with a flag for every parameter."""
    source = _spec_type(target) or target
    positional, _ = _positional(target)
    _, keywords = _positional(source)
    parser = Parser(prog=prog, exit_on_error=False)
    parser.summary, parser.example = _summary(target), example
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
                help=_argument_help(source, parameter.name),
            )
    skip: set[str | int] = {*lists, *(parameter.name for parameter in positional)}
    if isinstance(source, type):
        parser.add_class_arguments(source, None, as_group=False, sub_configs=False, skip=skip)
        parser.set_defaults(_default_classes(source))
    elif keywords:
        parser.add_function_arguments(source, None, as_group=False, skip=skip)
    for one in around:
        parser.add_function_arguments(one, None, as_group=False)
    deprecated = set(deprecated_keys(source))
    for action in parser._actions:
        action.help = SUPPRESS if action.dest in deprecated else action.help
        prefer_ours(action)
    parser.put_first(first)
    return parser


def to_plain(value: Any) -> Any:
    """Turn a spec into plain data that YAML can hold and `load_spec` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = [f for f in dataclasses.fields(value) if not f.metadata.get("deprecated")]
        names = [field.name for field in held]
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
    path.write_text(yaml.safe_dump(to_plain(value), sort_keys=False, width=100), encoding="utf-8")


def class_path(value: Any) -> str:
    """Return the dotted path of an object's class, the shortest that imports."""
    return import_path(type(value))


# What messages call kinds of values otherwise than Python does.
SEVERAL = "a list such as [a, b]"
NAMED_KINDS = {"NoneType": "null", "tuple": SEVERAL, "list": SEVERAL}
NAMED_KINDS |= {"int": "a whole number", "float": "a number"}


def nearest(word: str, known: Sequence[str], few: int = FEW) -> str:
    """Return ``, did you mean `x`?`` for the closest known word, or name all if they are few."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f", did you mean `{close[0]}`?"
    return f"; expected one of {', '.join(known)}" if 0 < len(known) <= few else "."


def parse_shard(text: str) -> tuple[int, int]:
    """Read "i/n" as i and n."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ConfigError(f"shard: expected i/n with 0 <= i < n, such as 0/4, got `{text}`")
    return int(first), int(second)


def _default_classes(source: type) -> dict[str, Any]:
    """Write defaults that are objects as class path and arguments, which flags may change."""
    if not dataclasses.is_dataclass(source):
        return {}
    made = {
        field.name: field.default_factory()
        for field in dataclasses.fields(source)
        if field.default_factory is not dataclasses.MISSING
    }
    return {name: to_plain(value) for name, value in made.items() if hasattr(value, "get_params")}


def _spec_type(target: Callable[..., Any]) -> type | None:
    if isinstance(target, type):
        return None
    _, parameters = _positional(target)
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
    """Return the item type of a flag that takes several words, ``--adapters a b``."""
    kinds = (annotation, *get_args(annotation))
    return next((k for k in (str, float, int) if list[k] in kinds), None)


def _summary(target: Callable[..., Any]) -> str:
    return (inspect.getdoc(target) or "").partition("\n\n")[0]


def _argument_help(target: Callable[..., Any], name: str) -> str:
    """Read the help of an argument from a docstring, of its own class or a parent's."""
    for owner in target.__mro__ if isinstance(target, type) else (target,):
        text = inspect.cleandoc(owner.__doc__ or "")
        if match := re.search(rf"^( +){name}: (.+(?:\n\1 +.+)*)", text, re.MULTILINE):
            return re.sub(r"\s+", " ", match[2])
    return ""


def _underscored(arg: str) -> str:
    """Flags may be typed with dashes: --on-error is --on_error."""
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if arg.startswith("--") else arg


def _explain(error: Exception, parser: ArgumentParser) -> str:
    """One line for a parser's error, with the nearest valid name if a name was wrong."""
    text = str(error)
    shown = [action for action in parser._actions if action.help != SUPPRESS]
    flags = sorted({o for a in shown for o in a.option_strings if o.startswith("--")})
    keys = sorted({part for flag in flags for part in [flag[2:], flag[2:].rpartition(".")[2]]})
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        flag = match.group(1).partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument `{flag}`{_such_as(parser)}"
        return f"unknown flag `{flag}`{nearest(flag, flags)}"
    if match := re.match(r".*(?:[Oo]ption|does not accept option) '([^']+)'", text):
        return f"unknown option `{match[1]}`{nearest(match[1], keys)}"
    if match := re.match(r"the following arguments are required: (.+)", text):
        names = match.group(1).split(", ")
        missing = [f"--{name}" if f"--{name}" in flags else name for name in names]
        return f"missing: {', '.join(missing)}{_such_as(parser)}"
    if match := re.match(r"argument (--\S+): expected (?:at least )?one argument", text):
        return f"{match[1]}: expected a value, got none"
    if match := re.match(r"Unexpected config: (.*)", text):
        return f"expected keys with values (`key: value`), got `{match[1]}`"
    if match := re.search(r"File does not exist: '([^']+)'", text):
        return f"there is no file {match[1]}"
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    return _explain_key(text, hints) or re.sub(r"\s*\n\s*", " ", text).strip()


def _such_as(parser: ArgumentParser) -> str:
    """The command's example, where it has one."""
    example = parser.example if isinstance(parser, Parser) else ""
    return f"; for example: {example}" if example else ""


def _explain_key(text: str, hints: dict[str, Any], owner: str = "") -> str | None:
    """Explain a value that does not fit its key; None where the message is none we know.

    Args:
        text: the parser's message.
        hints: key -> type.
        owner: of the keys, ``method.`` for those of the class that ``--method`` names.
    """
    match = re.match(r'Parser key "([^"]+)":\n(.*)', text, re.DOTALL)
    if not match:
        return None
    flag, body = f"--{owner}{match[1]}", match[2]
    if other := re.match(r"\s*Import path (\S+) does not correspond to a subclass of (\w+)", body):
        return f"{flag}: expected a subclass of {other[2]}, got `{other[1]}`; derive it from that"
    given = re.search(r"(?:(?:Given|Got) value|import path string): (.*)", body)
    value = given[1] if given else "nothing"
    hint = hints.get(match[1])
    if choices := list(choices_of(hint)):
        path, reason = _problem(body)
        option = re.search(r"NestedArg\(key='([^']+)'", body)
        if option and path.rpartition(".")[2] in ("", *(k.__name__ for k in classes_of(hint))):
            return f"{flag}.{option[1]}: expected {flag} first, one of {', '.join(choices)}"
        if path:
            return _explain_class(flag, path, reason)
        if match := re.search(r"Parameter '(\w+)' .*does not specify a type", body):
            return f"{flag}: cannot set `{match[1]}` of `{value}`, which has no type annotation"
        return f"{flag}: no class `{value}`{nearest(value, choices)}"
    if match := re.search(r"Literal\[(.*?)\]", body):
        return f"{flag}: expected {match[1].replace(chr(39), '')}, got `{value}`"
    kinds = re.findall(r"^[ -]*Expected an? <class '(\w+)'>", body, re.MULTILINE)
    names = " or ".join(NAMED_KINDS.get(kind, str(kind)) for kind in dict.fromkeys(kinds))
    return f"{flag}: expected {names}, got `{value}`" if names else None


def _problem(body: str) -> tuple[str, str]:
    """Dotted path of the class that a message finds fault with, and the fault; or two blanks."""
    match = re.search(r"^( *)(?:- )?Problem with given class_path '([^']+)':\n", body, re.MULTILINE)
    if not match:
        return "", ""
    deeper = re.match(rf"(?: {{{len(match[1]) + 1},}}.*\n?)*", body[match.end() :])
    return match[2], textwrap.dedent(deeper[0] if deeper else "").strip()


def _explain_class(flag: str, path: str, reason: str) -> str:
    """Explain what is wrong with the class that a flag names, or with its arguments."""
    if match := re.match(r"Option '([^']+)' is not accepted", reason):
        known = list(inspect.signature(pkgutil.resolve_name(path)).parameters)
        name = path.rpartition(".")[2]
        return f"unknown option `{match[1]}` of {name}{nearest(match[1], known)}"
    if match := re.match(r"the following arguments are required: (.+)", reason):
        return "missing: " + ", ".join(f"{flag}.{name}" for name in match[1].split(", "))
    if reason.startswith("Parser key"):
        hints = get_type_hints(pkgutil.resolve_name(path).__init__)
        explained = _explain_key(reason, hints, flag.removeprefix("--") + ".")
        return explained or f"{flag}: " + re.sub(r"\s*\n\s*", " ", reason)
    return f"{flag}: cannot load `{path}` ({reason.splitlines()[0]})"
