"""Write docs/cli.md, every command with its help; ``make help`` runs it."""

from pathlib import Path

from lora_ws.commands.help import help_file
from lora_ws.commands.table import COMMANDS

PAGE = Path(__file__).parents[1] / "cli.md"
HEAD = """# Commands

The help of every command, as printed by `lora-ws COMMAND --help`. For a mistyped flag, the error
suggests the nearest valid one. `--config` reads flags from a YAML file. Exit codes: 0 done, 1 ran
and failed, 2 invalid input, 3 a scan that flagged files."""


def render() -> str:
    """The page, from the table of commands and their rendered help."""
    links = [
        f"- [`lora-ws {name}`](#{_anchor(name)}): {command.text}"
        for name, command in COMMANDS.items()
    ]
    parts = [HEAD, "\n".join(links)]
    for name in COMMANDS:
        said = help_file(name).read_text(encoding="utf-8").rstrip()
        parts.append(f"## lora-ws {name}\n\n```text\n{said}\n```")
    return "\n\n".join(parts) + "\n"


def _anchor(name: str) -> str:
    return f"lora-ws-{name}".replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
