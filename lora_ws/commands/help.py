"""What `lora-ws COMMAND --help` prints: rendered beforehand, so that it is there at once."""

import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path

from lora_ws.commands.table import described, function_of

HELP_WIDTH = 100


def help_text(name: str) -> str:
    """Render the help of a command from its signature, which imports all that it names.

    Example:
        >>> help_text("inspect").splitlines()[0]
        'Describe an adapter file: base model, method, ranks, scales, norms, and warnings.'
    """
    from lora_ws.config import parse

    text = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(HELP_WIDTH)
    try:
        with redirect_stdout(text), suppress(SystemExit):
            parse(function_of(name), ["--help"], *described(name))
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    return text.getvalue()


def help_file(name: str) -> Path:
    """Where ``make help`` puts the rendered help of a command, which then is answered at once."""
    return Path(__file__).parents[1] / "_assets" / "help" / f"{name.replace(' ', '_')}.txt"
