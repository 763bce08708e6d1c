"""What to type next: commands as this shell finds them."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console


def program() -> str:
    """How `lora-ws` is called from here: by name, by the path it has, or as a module."""
    if shutil.which("lora-ws"):
        return "lora-ws"
    called = Path(sys.argv[0])
    return str(called) if called.name == "lora-ws" else f"{Path(sys.executable)} -m lora_ws"


def command(*words: str | Path) -> str:
    """A command's line, quoted for a shell; files below the working folder by their short paths."""
    return " ".join([program(), *(shlex.quote(_short(word)) for word in words)])


def show_next(console: Console, steps: Mapping[str, str]) -> None:
    """Print command lines, each below what it does.

    Args:
        console: where to.
        steps: what it does -> command line.
    """
    console.print("\nNext:", markup=False)
    for what, line in steps.items():
        console.print(f"  # {what}\n  {line}", markup=False)


def _short(word: str | Path) -> str:
    here = Path.cwd()
    if isinstance(word, Path) and word.is_absolute() and word.is_relative_to(here):
        return str(word.relative_to(here))
    return str(word)
