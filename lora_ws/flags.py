"""The parser behind every command: how its help reads, and names that stand for classes."""

import dataclasses
import importlib
import inspect
import re
import textwrap
from argparse import Action, HelpFormatter
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

WIDTH = 100
# Values and not flags; argparse's own pattern knows no exponents.
NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)


class Parser(ArgumentParser):
    """Opens its help with a sentence, an example and the flags that matter; takes no abbreviations.

    jsonargparse makes more of it, for the classes that flags name.

    Attributes:
        summary: the sentence.
        example: a line to type.
    """

    summary = ""
    example = ""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Help, **given})
        self._negative_number_matcher = NEGATIVE_NUMBER

    def put_first(self, names: Sequence[str]) -> None:
        """Give some flags a group of their own, before all other flags."""
        # argparse has no public way to order what it shows.
        groups: Any = self._action_groups
        self._positionals.title, self._optionals.title = "arguments", "more flags"
        actions = [action for n in names if (action := self._find(n))]
        for group in groups:
            group._group_actions[:] = [a for a in group._group_actions if a not in actions]
        main = self.add_argument_group("main flags")
        main._group_actions.extend(actions)
        groups.remove(main)
        groups.insert(1, main)
        self.usage = " ".join(
            [self.prog, *map(_usage, self._positionals._group_actions), "[flags]"]
        )

    def _find(self, name: str) -> Action:
        return next(a for a in self._actions if f"--{name}" in a.option_strings)

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Put sentence and example before usage and flags."""
        parts = [textwrap.fill(self.summary, WIDTH)] if self.summary else []
        parts += [f"example:\n  {self.example}"] if self.example else []
        return "\n\n".join([*parts, super().format_help(formatter)])


def _usage(action: Action) -> str:
    return f"{action.dest} [{action.dest} ...]" if action.nargs == "+" else action.dest


class _Help(DefaultHelpFormatter):
    """Lists our own classes as choices, not all of scikit-learn's that happen to be imported."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        choices = ", ".join(choices_of(getattr(action, "_typehint", None)))
        return re.sub(r"known subclasses: [^)]*", f"one of {choices}, or any by dotted path", text)


def import_path(kind: type) -> str:
    """Return the dotted path of a class, the shortest that imports."""
    parent = kind.__module__.rpartition(".")[0]
    if parent and getattr(importlib.import_module(parent), kind.__name__, None) is kind:
        return f"{parent}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def classes_of(hint: Any) -> list[type]:
    """Classes in a type, such as both of ``Metanetwork | BaseEstimator``."""
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]


def choices_of(hint: Any) -> dict[str, str]:
    """Names that stand for a class path: what our packages export for the base class in a type.

    Where one base is ours and another is not, ours alone has names.
    """
    bases = [k for k in classes_of(hint) if not dataclasses.is_dataclass(k)]
    bases = [k for k in bases if k.__module__ not in ("builtins", "pathlib")]
    found, queue = dict[str, str](), [k for k in bases if _is_ours(k)] or bases
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        path = import_path(kind)
        exported = path != f"{kind.__module__}.{kind.__qualname__}"
        if _is_ours(kind) and exported and not inspect.isabstract(kind):
            found[kind.__name__] = path
    return dict(sorted(found.items()))


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("lora_ws.")


def deprecated_keys(source: Any, prefix: str = "") -> Iterator[str]:
    """Keys that are read but not shown, of a spec and of those inside it."""
    if not dataclasses.is_dataclass(source):
        return
    types = get_type_hints(source)
    for field in dataclasses.fields(source):
        if field.metadata.get("deprecated"):
            yield prefix + field.name
        yield from deprecated_keys(types[field.name], f"{prefix}{field.name}.")


def prefer_ours(action: Action) -> None:
    """Have a short name mean our class where the user has one of the same name."""
    if paths := choices_of(getattr(action, "_typehint", None)):
        typed: Any = action
        check = typed._check_type_
        typed._check_type_ = lambda value, **given: check(_dotted(value, paths), **given)


def _dotted(value: Any, paths: dict[str, str]) -> Any:
    """What a key was given, with a class's short name replaced by its path."""
    if isinstance(value, list):
        return [_dotted(item, paths) for item in value]
    if isinstance(value, dict) and "class_path" in value:
        return {**value, "class_path": _dotted(value["class_path"], paths)}
    return paths.get(value, value) if isinstance(value, str) else value
