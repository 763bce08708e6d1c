"""Numbers out of range: one line that names the flag, before a model is loaded."""

from functools import partial
from typing import Any

import pytest

from lora_ws.attribution.spec import AttributeSpec
from lora_ws.cli import main
from lora_ws.composition.spec import ComposeSpec
from lora_ws.concepts.spec import AmplifySpec, EraseSpec
from lora_ws.errors import ConfigError

COMMANDS = {
    "compose": partial(ComposeSpec, base="digit-sd", adapters=["a"], prompt="three"),
    "attribute": partial(AttributeSpec, base="digit-sd", adapters=["a"], prompt="three"),
    "concepts erase": partial(EraseSpec, base="digit-sd", concept="three"),
    "concepts amplify": partial(AmplifySpec, base="digit-sd", concept="three"),
}
NAN = float("nan")
STEPS, GUIDANCE = (0, -1, 1001, 10**30), (-0.5, 1e30, NAN, float("inf"))
SIDES = {"width": (0, -8, 10**30), "height": (0, 8193)}
DRAWING = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": (-1, 2**64)}
SCALES = {"scales": ([1e30], [NAN], [-1e4])}
EDIT = {"steps": STEPS, "guidance_scale": GUIDANCE, "budget": (0.0, -0.1, 1.5, 1e30, NAN)}
WRONG = {
    "compose": DRAWING | SCALES | SIDES | {"images": (0, -1, 10**30), "seeds": ([1, -1],)},
    "attribute": DRAWING | SCALES | {"start": (-1, 10**30), "batch": (0,), "shown": (-1,)},
    "concepts erase": EDIT
    | {"seeds": (0, -1, 10**30), "preserve": (["six", "three"],), "neighbours": (["three"],)},
    "concepts amplify": EDIT | {"images": (0, 10**30), "seed": (-1,)},
}
CASES: list[tuple[str, str, Any]] = [
    (command, name, value)
    for command, flags in WRONG.items()
    for name, values in flags.items()
    for value in values
]


@pytest.mark.parametrize(("command", "name", "value"), CASES)
def test_a_number_out_of_range_is_named(command: str, name: str, value: Any) -> None:
    COMMANDS[command]()
    with pytest.raises(ConfigError, match=rf"^{name}: expected [^\n]+, got [^\n]+$"):
        COMMANDS[command](**{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("command", WRONG)
def test_the_command_line_says_it_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    about = "--concept" if command.startswith("concepts") else "--prompt"
    given = [*command.split(), "--base", "digit-sd", about, "three"]
    given += ["--adapters", "a"] * (about == "--prompt")
    for name, values in WRONG[command].items():
        value = values[0]
        texts = map(str, value if isinstance(value, list) else [value])
        assert main([*given, f"--{name}", *texts]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
