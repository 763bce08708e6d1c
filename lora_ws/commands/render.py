"""Write down what is slow to make: the help of every command, and completion (``make help``)."""

from typing import get_args

from lora_ws.commands.completion import Shell, script, script_file
from lora_ws.commands.help import help_file, help_text
from lora_ws.commands.table import COMMANDS

if __name__ == "__main__":
    for name in COMMANDS:
        help_file(name).write_text(help_text(name), encoding="utf-8")
    for shell in get_args(Shell):
        script_file(shell).write_text(script(shell), encoding="utf-8")
