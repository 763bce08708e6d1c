"""`lora-ws`: a table of commands, each imported only when it is called.

Exit codes: 0 done, 1 ran and failed, 2 bad input, 3 a scan that flagged files.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_ws.commands.help import help_file
from lora_ws.commands.table import COMMANDS, described, function_of
from lora_ws.errors import ConfigError, DeprecatedName, LoraWsError, Notice
from lora_ws.system import choose_numpy_kernels, write_utf8

# What was called otherwise until now, taken for one release with a notice.
OLD_COMMANDS = {
    "components erase": "concepts erase",
    "components amplify": "concepts amplify",
}
DRAWING = {
    "--negative": "--negative_prompt",
    "--guidance": "--guidance_scale",
    "--steps": "--num_inference_steps",
}
OLD_FLAGS: dict[str, dict[str, str]] = {
    "concepts erase": {"--guidance": "--guidance_scale"},
    "concepts amplify": {"--guidance": "--guidance_scale"},
    "attribute": DRAWING,
    "compose": {
        **DRAWING,
        "--tau": "--method.tau",
        "--method merge": "--method Merge",
        "--method merge-normalised": "--method Merge --method.normalised true",
        "--method switch": "--method Switch",
        "--method composite": "--method Composite",
    },
}

# Packages that only an extra brings, and which.
EXTRAS = {
    **dict.fromkeys(("diffusers", "transformers", "tokenizers"), "diffusion"),
    **dict.fromkeys(("fastapi", "uvicorn"), "serve"),
    "optuna": "tune",
    "ray": "ray",
}
MAIN = ("train", "predict", "scan", "similar", "compose")
UNUSABLE = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; errors of this library become one line on stderr."""
    write_utf8()
    choose_numpy_kernels()
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage())  # noqa: T201
        return 0
    if args[1:] in (["-h"], ["--help"]) and (started := group_of(args[0])):
        print(f"usage: lora-ws {args[0]} COMMAND [--help]\n\ncommands:\n{listed(started)}")  # noqa: T201
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"lora_ws {version('lora_ws')}")  # noqa: T201
        return 0
    try:
        name, rest = find_command(args)
        return _call(name, rest)
    except LoraWsError as error:
        print(f"lora-ws: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        return 1
    except UNUSABLE as error:
        print(f"lora-ws: cannot use {error.filename}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("lora-ws: stopped; run the same command again to go on", file=sys.stderr)  # noqa: T201
        return 1
    except Exception as error:
        if os.environ.get("LORA_WS_DEBUG"):
            raise
        print(  # noqa: T201
            f"lora-ws: failed: {type(error).__name__}: {error} (LORA_WS_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        return 1


def usage() -> str:
    """Format the list of commands, those to start with first."""
    return "\n".join(
        [
            "Read what a LoRA adapter learned from its weights alone.",
            "",
            "example:",
            "  lora-ws predict my_lora.safetensors",
            "",
            "usage: lora-ws COMMAND [--help], or lora-ws --version",
            "",
            "main commands:",
            listed(MAIN),
            "",
            "more commands:",
            listed([name for name in COMMANDS if name not in MAIN]),
        ]
    )


def listed(names: Sequence[str]) -> str:
    """A line for each command."""
    width = max(map(len, COMMANDS))
    return "\n".join(f"  {name:<{width}}  {COMMANDS[name].text}" for name in names)


def group_of(word: str) -> list[str]:
    """The commands that begin with a word: those of ``data``, say."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def find_command(args: Sequence[str]) -> tuple[str, list[str]]:
    """Split arguments into the command's name and the rest."""
    for words in (2, 1):
        name = " ".join(args[:words])
        if name in OLD_COMMANDS:
            _notice(name, name := OLD_COMMANDS[name])
        if name in COMMANDS:
            return name, _renamed(list(args[words:]), OLD_FLAGS.get(name, {}))
    from lora_ws.config import nearest

    if started := group_of(args[0]):
        known = [name.split()[1] for name in started]
        if args[1:] and not args[1].startswith("-"):
            near = nearest(args[1], known)
            raise ConfigError(f"unknown command `{args[0]} {args[1]}`{near}")
        raise ConfigError(f"`{args[0]}` needs one of: {', '.join(known)}")
    raise ConfigError(f"unknown command `{args[0]}`{nearest(args[0], list(COMMANDS))}")


def _renamed(args: list[str], old: dict[str, str]) -> list[str]:
    """Write flags as they are called now; those of a class come last, after what names it."""
    done, last = list[str](), list[str]()
    while args:
        flag, equals, value = args.pop(0).partition("=")
        word = value if equals else "".join(args[:1])
        if f"{flag} {word}" in old:
            _notice(f"{flag} {word}", new := old[f"{flag} {word}"])
            done += new.split()
            del args[: not equals]
        elif flag in old:
            _notice(flag, new := old[flag])
            place = last if "." in new else done
            place += [new, word]
            del args[: not equals]
        else:
            done.append(flag + equals + value)
    return done + last


def _notice(old: str, new: str) -> None:
    print(f"lora-ws: `{old}` is `{new}` now; the next release forgets it", file=sys.stderr)  # noqa: T201


def _call(name: str, args: list[str]) -> int:
    if args in (["--help"], ["-h"]) and help_file(name).is_file():
        print(help_file(name).read_text(encoding="utf-8"), end="")  # noqa: T201
        return 0
    try:
        return _run(name, function_of(name), args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        needs = f"`{name}` needs {package}: pip install 'lora_ws[{EXTRAS[package]}]'"
        raise ConfigError(needs) from error


def _run(name: str, target: Callable[..., int | None], args: list[str]) -> int:
    from lora_ws.config import parse

    # Classes of the user's own are named by dotted path and often lie in the working folder.
    sys.path.append(str(Path.cwd()))
    with _notices():
        try:
            run = parse(target, args, *described(name))
        except SystemExit as stop:  # --help and --print_config
            return int(stop.code or 0)
        return int(run() or 0)


@contextmanager
def _notices() -> Iterator[None]:
    """Say in one line each what is deprecated, not used or left out."""
    with warnings.catch_warnings():
        shown, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, DeprecatedName | Notice):
                # A command that opens its data several times says what it leaves out once.
                if str(message) not in said:
                    print(f"lora-ws: {message}", file=sys.stderr)  # noqa: T201
                said.add(str(message))
            else:
                shown(message, category, *where)

        warnings.showwarning = show
        yield


if __name__ == "__main__":  # a guess at `python -m lora_ws`, which would end in silence
    raise SystemExit(main())
