"""What commands load before they answer: nothing for help, nothing that fits for a verdict."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_ws.collection import load
from lora_ws.commands.completion import script, script_file
from lora_ws.commands.help import help_file, help_text
from lora_ws.commands.table import COMMANDS, described, function_of
from lora_ws.config import parse
from lora_ws.featurizers import StatsFlatVec
from lora_ws.learn.run import run
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import MLP

# What fits, chooses and tests; a verdict is torch and numpy.
FITS = {"sklearn", "scipy", "pandas"}
TRAINS = {"lightning", "torchmetrics", "matplotlib", "diffusers", "transformers", "wandb"}
HEAVY = {*TRAINS, "torch", "numpy", "scipy", "sklearn", "jsonargparse", "rich"}

# Runs commands in one process; prints which modules of interest each has brought in.
SCRIPT = """
import contextlib, io, json, sys
from lora_ws.cli import main
commands, wanted = json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))
for words in commands:
    with contextlib.redirect_stdout(io.StringIO()):
        # A server does not end: what it serves is loaded.
        if words == ["serve"]:
            import lora_ws.web.app
            code = 0
        else:
            code = main(words)
    print(json.dumps([words[0], code, sorted(wanted & set(sys.modules))]))
"""


def loaded(
    commands: list[list[str]], wanted: set[str], folder: Path
) -> list[tuple[str, int, list[str]]]:
    script = [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(sorted(wanted))]
    done = subprocess.run(
        script, cwd=folder, env=dict(os.environ), capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_rendered_help_is_that_of_the_flags(name: str) -> None:
    """Where this fails, flags have changed: run ``make help``."""
    assert help_file(name).read_text(encoding="utf-8") == help_text(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_opens_with_a_sentence_an_example_and_what_matters(name: str) -> None:
    prog, example, first, _ = described(name)
    sentence, shown, usage, *sections = help_file(name).read_text(encoding="utf-8").split("\n\n")
    assert sentence.endswith(".")
    assert shown == f"example:\n  {example}"
    assert usage.startswith(f"usage: {prog}")
    flags = [part for part in sections if not part.startswith("arguments:")]
    if first:
        assert flags[0].startswith("main flags:")
        assert len(first) <= 5
        assert tuple(re.findall(r"^  --([\w.]+)", flags[0], re.MULTILINE)) == first
    assert callable(
        parse(function_of(name), shlex.split(example)[len(prog.split()) :], *described(name))
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_that_of_the_flags(shell: str) -> None:
    """Where this fails, flags have changed: run ``make help``."""
    assert script_file(shell).read_text(encoding="utf-8") == script(shell)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], {"train"}),
        (["data", "im"], {"import"}),
        (["train", "--dat"], {"--dataset"}),
        (["train", "--seeds", "3", "--fit.opt"], {"--fit.optimizer"}),
        (["train", "--featurizer", "StatsL"], {"StatsLayer", "StatsLayerDense"}),
        (["predict", "a.safetensors", "--as_json", "f"], {"false"}),
    ],
)
def test_bash_completes_commands_flags_and_values(words: list[str], expected: set[str]) -> None:
    asked = shlex.join(["lora-ws", *words])
    lines = [
        f"source {shlex.quote(str(script_file('bash')))}",
        f"COMP_WORDS=({asked}); COMP_CWORD={len(words)}",
        "called=$(complete -p lora-ws); called=${called##*-F }; ${called%% *}",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, encoding="utf-8")
    assert set(done.stdout.split()) == expected, done.stderr


def test_every_help_file_is_of_a_command() -> None:
    folder = help_file("train").parent
    assert {file.name for file in folder.iterdir()} == {help_file(n).name for n in COMMANDS}


def test_help_loads_nothing(tmp_path: Path) -> None:
    found = loaded([[*name.split(), "--help"] for name in COMMANDS], HEAVY, tmp_path)
    assert [(code, modules) for _, code, modules in found] == [(0, [])] * len(COMMANDS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and two adapters."""
    folder = tmp_path_factory.mktemp("home")
    spec = ExperimentSpec(
        subset="shared/class",
        featurizer=StatsFlatVec(),
        model=MLP(hidden=(8,)),
        fit=FitSpec(max_epochs=1),
        seeds=1,
    )
    run(spec, folder / "run")
    adapters = load("lora-ws-mini", subset="shared/class")
    for row in range(2):
        tensors = {
            f"unet.{m.layer.name}.lora.{m.role}.weight": np.array(
                adapters.weights[row, m.columns].reshape(m.shape)
            )
            for m in adapters.layout.matrices
        }
        save_file(tensors, folder / f"{row}.safetensors")
    return folder


MODEL = ["--model", "run/bundle"]


@pytest.mark.slow
def test_verdicts_load_nothing_that_fits_or_trains(home: Path) -> None:
    commands = [
        ["inspect", "0.safetensors"],
        ["predict", "0.safetensors", *MODEL],
        ["scan", "0.safetensors", "1.safetensors", *MODEL, "--cache", "cache", "--out", "a.html"],
        ["similar", "0.safetensors", "--index", "1.safetensors"],
        ["dedup", "0.safetensors", "1.safetensors"],
        ["serve"],
    ]
    found = loaded(commands, TRAINS | FITS, home)
    assert [code for _, code, _ in found] == [0] * len(commands)
    assert {name: modules for name, _, modules in found if modules} == {}


@pytest.mark.slow
def test_a_verdict_of_the_shipped_reader_is_numpy_alone(home: Path) -> None:
    commands = [["predict", "0.safetensors"], ["demo"]]
    found = loaded(commands, TRAINS | FITS | {"torch"}, home)
    assert [(code, modules) for _, code, modules in found] == [(0, [])] * len(commands)


@pytest.mark.slow
def test_evaluating_trains_nothing_though_it_draws(home: Path) -> None:
    """It measures by torchmetrics, which loads matplotlib."""
    ((_, code, modules),) = loaded([["evaluate", *MODEL, "--subset", "shared/class"]], TRAINS, home)
    assert code == 0
    assert not {"lightning", "diffusers", "wandb"} & set(modules)
