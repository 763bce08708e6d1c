"""Launch scripts: what they run is run here, with a program that notes how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

from lora_ws.cli import find_command
from lora_ws.config import parse, spec_root
from lora_ws.zoo.spec import ZooSpec

SCRIPTS = sorted((spec_root("training") / "slurm").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_it_runs_is_a_valid_command(script: Path, tmp_path: Path) -> None:
    fake = tmp_path / "lora-ws"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "8",
    }
    root = script.parents[2]
    done = subprocess.run(["bash", script], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, args = find_command(done.stdout.splitlines())
    assert name == "zoo build"
    args = [str(root / a) if a.endswith(".yaml") else a for a in args]

    def take(spec: ZooSpec) -> ZooSpec:
        return spec

    spec = parse(take, args, prog=name)()
    assert spec.share == (3, 8)
    assert [part.device for part in spec.parts()] == ["cuda:0"]
