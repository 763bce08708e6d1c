"""`lora-ws`: a table of commands, each imported only when it is called.

Exit codes: 0 done, 1 ran and failed, 2 bad input, 3 a scan that flagged files.
"""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from lora_ws.errors import ConfigError, DeprecatedName, LoraWsError
from lora_ws.system import write_utf8

# Two words are a command and what it acts on.
COMMANDS = {
    "data list": ("lora_ws.commands.data:list_collections", "list the known collections"),
    "data info": ("lora_ws.commands.data:info", "describe a collection"),
    "data import": ("lora_ws.commands.data:import_", "import adapters from files or the Hub"),
    "data prompt-leak": (
        "lora_ws.commands.data:prompt_leak",
        "how much of the labels the prompts of training give away",
    ),
    "featurize": ("lora_ws.commands.featurize:featurize", "write a representation to a file"),
    "train": ("lora_ws.commands.train:train", "train and evaluate classifiers"),
    "sweep": ("lora_ws.commands.reproduce:sweep", "train on each layer or matrix alone"),
    "reproduce": ("lora_ws.commands.reproduce:reproduce", "tables and figures of `eval/`"),
    "check-reader": (
        "lora_ws.commands.check_reader:check_reader",
        "measure the symmetries of a network",
    ),
    "evaluate": ("lora_ws.commands.evaluate:evaluate", "measure a trained classifier"),
    "zoo base": ("lora_ws.commands.zoo:base", "train a small diffusion model"),
    "zoo build": ("lora_ws.commands.zoo:build", "train many adapters at once"),
    "zoo merge": ("lora_ws.commands.zoo:merge", "join the shards of a collection"),
    "zoo testbed": ("lora_ws.commands.zoo:testbed", "train adapters to compose"),
    "zoo baselines": ("lora_ws.commands.zoo:baselines", "logistic regression on plain inputs"),
    "zoo export": ("lora_ws.commands.zoo:export", "write a collection as folders or parquet"),
    "zoo publish": ("lora_ws.commands.zoo:publish", "upload a collection to the Hub"),
    "inspect": ("lora_ws.commands.adapters:inspect", "describe an adapter file"),
    "convert": ("lora_ws.commands.adapters:convert", "write an adapter in another file format"),
    "predict": ("lora_ws.commands.predict:predict", "classify adapter files"),
    "scan": ("lora_ws.commands.scan:scan", "triage folders, lists and Hub repositories"),
    "similar": ("lora_ws.commands.similar:similar", "find the adapters most like one"),
    "prompt": ("lora_ws.commands.prompt:prompt", "words of the prompt behind adapter files"),
    "search": ("lora_ws.commands.prompt:search", "find adapters by words of their prompt"),
    "compose": ("lora_ws.commands.compose:compose", "generate images with several adapters"),
    "attribute": ("lora_ws.commands.attribute:attribute", "what each adapter changes in an image"),
    "concepts erase": ("lora_ws.commands.concepts:erase", "erase a concept from a base model"),
    "concepts amplify": ("lora_ws.commands.concepts:amplify", "amplify a concept in a base model"),
    "serve": ("lora_ws.commands.serve:serve", "serve a web page and an API for single files"),
    "dedup": ("lora_ws.commands.similar:dedup", "group duplicate and near-duplicate adapters"),
}


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
    **dict.fromkeys(("diffusers", "peft", "transformers", "tokenizers", "accelerate"), "diffusion"),
    **dict.fromkeys(("fastapi", "uvicorn"), "serve"),
}
HELP_WIDTH = 100
UNUSABLE = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; errors of this library become one line on stderr."""
    write_utf8()
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage())  # noqa: T201
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
    """Format the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lora-ws COMMAND [--help]",
            "",
            "Read what a LoRA adapter learned from its weights alone.",
            "",
            *lines,
        ]
    )


def find_command(args: Sequence[str]) -> tuple[str, list[str]]:
    """Split arguments into the command's name and the rest."""
    for words in (2, 1):
        name = " ".join(args[:words])
        if name in OLD_COMMANDS:
            _notice(name, name := OLD_COMMANDS[name])
        if name in COMMANDS:
            return name, _renamed(list(args[words:]), OLD_FLAGS.get(name, {}))
    from lora_ws.config import nearest

    started = [name for name in COMMANDS if name.startswith(f"{args[0]} ")]
    if started:
        raise ConfigError(f"`{args[0]}` needs one of: {', '.join(n.split()[1] for n in started)}")
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


def help_text(name: str) -> str:
    """Render the help of a command from its signature, which imports all that it names.

    Example:
        >>> help_text("inspect").splitlines()[0]
        'usage: lora-ws inspect [--config CONFIG] [--as_json {true,false}] file'
    """
    from lora_ws.config import parse

    module, _, function = COMMANDS[name][0].partition(":")
    target, text = getattr(importlib.import_module(module), function), io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(HELP_WIDTH)
    try:
        with redirect_stdout(text), suppress(SystemExit):
            parse(target, ["--help"], prog=f"lora-ws {name}")
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    return text.getvalue()


def help_file(name: str) -> Path:
    """Where ``make help`` puts the rendered help of a command, which then is answered at once."""
    return Path(__file__).parent / "_assets" / "help" / f"{name.replace(' ', '_')}.txt"


def _call(name: str, args: list[str]) -> int:
    if args in (["--help"], ["-h"]) and help_file(name).is_file():
        print(help_file(name).read_text(encoding="utf-8"), end="")  # noqa: T201
        return 0
    module, _, function = COMMANDS[name][0].partition(":")
    try:
        return _run(name, getattr(importlib.import_module(module), function), args)
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
            run = parse(target, args, prog=f"lora-ws {name}")
        except SystemExit as stop:  # --help and --print_config
            return int(stop.code or 0)
        return int(run() or 0)


@contextmanager
def _notices() -> Iterator[None]:
    """Say in one line each what is deprecated."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if category is DeprecatedName:
                print(f"lora-ws: {message}", file=sys.stderr)  # noqa: T201
            else:
                shown(message, category, *where)

        warnings.showwarning = show
        yield
