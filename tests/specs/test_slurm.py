"""Launch scripts: what they run is run here, with programs that note how they were called."""

import inspect
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lora_ws.cli import find_command
from lora_ws.commands.table import function_of
from lora_ws.config import parse, spec_root

FOLDER = spec_root("training") / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
PROGRAMS = {
    "lora-ws": 'printf "%s\\n" "$@"',
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
}


def called(script: Path, folder: Path) -> tuple[str, Any]:
    """The command a script runs, and the spec that its flags make."""
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "8",
    }
    root = script.parents[2]
    done = subprocess.run(
        ["bash", script], env=env, cwd=root, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    name, args = find_command(done.stdout.splitlines())
    args = [str(root / a) if a.endswith(".yaml") else a for a in args]
    target = function_of(name)
    (parameter,) = inspect.signature(target).parameters.values()

    def take(spec: Any) -> Any:
        return spec

    take.__annotations__["spec"] = parameter.annotation
    return name, parse(take, args, prog=name)()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_it_runs_is_a_valid_command(script: Path, tmp_path: Path) -> None:
    name, _ = called(script, tmp_path)
    assert name in ("zoo build", "train", "sweep")


def test_a_task_of_an_array_builds_its_share_on_its_gpu(tmp_path: Path) -> None:
    _, spec = called(FOLDER / "zoo.sh", tmp_path)
    assert spec.share == (3, 8)
    assert [part.device for part in spec.parts()] == ["cuda:0"]


def test_a_task_of_a_sweep_takes_its_share(tmp_path: Path) -> None:
    _, spec = called(FOLDER / "sweep.sh", tmp_path)
    assert (spec.over, spec.shard, spec.seeds) == ("matrices", "3/8", 10)


def test_there_is_a_task_for_every_device(tmp_path: Path) -> None:
    _, spec = called(FOLDER / "ddp.sh", tmp_path)
    asked = dict(
        re.findall(r"#SBATCH --([\w-]+)=(\S+)", (FOLDER / "ddp.sh").read_text(encoding="utf-8"))
    )
    assert int(asked["nodes"]) == spec.trainer.num_nodes == 2
    assert int(asked["ntasks-per-node"]) == spec.trainer.devices == 8
    assert asked["gpus-per-node"].endswith(":8")
    assert spec.trainer.epochs_to_checkpoint > 0
