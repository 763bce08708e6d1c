"""`lora-ws completion`: what a shell needs to complete commands, flags and their values."""

import argparse
from pathlib import Path
from typing import Literal, get_args

from lora_ws.commands.table import COMMANDS, described, function_of
from lora_ws.config import make_parser
from lora_ws.errors import ConfigError
from lora_ws.flags import choices_of

Shell = Literal["bash", "zsh", "fish"]


def completion(shell: str, /) -> None:
    """Print a completion script: put into ~/.bashrc `source <(lora-ws completion bash)`.

    Args:
        shell: bash; zsh, whose script is a file `_lora-ws` in a folder of $fpath; or fish, whose
            script is `~/.config/fish/completions/lora-ws.fish`
    """
    if shell not in get_args(Shell):
        raise ConfigError(f"shell: expected {' or '.join(get_args(Shell))}, got `{shell}`")
    print(script_file(shell).read_text(encoding="utf-8"), end="")  # noqa: T201


def script_file(shell: str) -> Path:
    """Where ``make help`` puts the script of a shell."""
    return Path(__file__).parents[1] / "_assets" / "completion" / f"lora-ws.{shell}"


def script(shell: str) -> str:
    """Write the script of a shell, which imports all commands and needs shtab."""
    import shtab

    root = argparse.ArgumentParser("lora-ws")
    root.add_argument("--version", action="store_true")
    groups = {"": root.add_subparsers()}
    for name, command in COMMANDS.items():
        group, _, verb = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=group).add_subparsers()
        _add(name, groups[group].add_parser(verb, help=command.text))
    return shtab.complete(root, shell)


def _add(name: str, parser: argparse.ArgumentParser) -> None:
    """Copy the arguments of a command: what they are called, and which values they take."""
    import shtab

    for action in make_parser(function_of(name), *described(name))._actions:
        if "--help" in action.option_strings or action.help == argparse.SUPPRESS:
            continue
        hint = getattr(action, "_typehint", None)
        values = list(choices_of(hint)) or _values(hint)
        names = action.option_strings or [action.dest]
        copied = parser.add_argument(*names, help=(action.help or "").partition(";")[0])
        if values:
            copied.choices = values
        elif hint is None or Path in (hint, *get_args(hint)):
            copied.complete = shtab.FILE  # type: ignore[attr-defined]


def _values(hint: object) -> list[str]:
    """The words that a type consists of."""
    if hint is bool:
        return ["true", "false"]
    kinds = [hint, *get_args(hint)]
    return [str(w) for kind in kinds for w in get_args(kind) if isinstance(w, str)]
