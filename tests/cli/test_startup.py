"""What commands load before they answer: nothing for help, nothing that fits for a verdict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_ws.cli import COMMANDS, help_file, help_text
from lora_ws.collection import load
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
    # pyarrow loads pandas for its first array, where there is one.
    judged = {name: set(modules) - {"pandas"} for name, _, modules in found}
    assert {name: modules for name, modules in judged.items() if modules} == {}
    assert {name: modules for name, _, modules in found}["predict"] == []


@pytest.mark.slow
def test_evaluating_trains_nothing_though_it_draws(home: Path) -> None:
    """It measures by torchmetrics, which loads matplotlib."""
    ((_, code, modules),) = loaded([["evaluate", *MODEL, "--subset", "shared/class"]], TRAINS, home)
    assert code == 0
    assert not {"lightning", "diffusers", "wandb"} & set(modules)
