"""The pre-commit hook and the GitHub Action: what they run is what changed, and flags fail them."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from lora_ws.adapters.locate import PICKLED
from lora_ws.cli import find_command

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="the script is of bash")
GOOD = ROOT / "lora_ws" / "_assets" / "examples" / "orchid.safetensors"


class Ran(NamedTuple):
    """What came of a script."""

    code: int
    words: list[str]
    outputs: str


def git(*args: str, cwd: Path) -> str:
    known = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        [*known, *args], cwd=cwd, check=True, capture_output=True, encoding="utf-8"
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with an adapter; names of the next are for a test to choose."""
    home = tmp_path / "repository"
    home.mkdir()
    git("init", "--quiet", cwd=home)
    (home / "old.safetensors").write_bytes(GOOD.read_bytes())
    commit(home)
    return home


def commit(home: Path) -> str:
    git("add", "--all", cwd=home)
    git("commit", "--quiet", "-m", "x", cwd=home)
    return git("rev-parse", "HEAD", cwd=home)


def scan_step(home: Path, stub: str, **env: str) -> Ran:
    """Run the scan of action.yml with a program in place of `lora-ws`."""
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    (script,) = [s["run"] for s in action["runs"]["steps"] if s.get("id") == "scan"]
    temp = home.parent / "temp"
    temp.mkdir(exist_ok=True)
    program = temp / "lora-ws"
    program.write_text(f"#!/bin/sh\n{stub}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    known = {"RUNNER_TEMP": str(temp), "GITHUB_OUTPUT": str(temp / "outputs")}
    known |= {"PATH": f"{temp}:{os.environ['PATH']}", "MODEL": "", "POLICY": ""}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=home,
        env={**os.environ, **known, **env},
        capture_output=True,
        encoding="utf-8",
    )
    outputs = temp / "outputs"
    said = outputs.read_text(encoding="utf-8") if outputs.exists() else ""
    return Ran(done.returncode, done.stdout.split("\n")[:-1], said)


SHOW = 'printf "%s\\n" "$@"; exit 3'


@posix
def test_the_action_scans_what_changed(repository: Path) -> None:
    base = git("rev-parse", "HEAD", cwd=repository)
    for name in ("--out=x.safetensors", "a b.safetensors", "c.ckpt", "notes.txt"):
        (repository / name).write_bytes(b"x")
    (repository / "old.safetensors").unlink()
    commit(repository)
    ran = scan_step(repository, SHOW, BASE=base, POLICY="p.yaml", MODEL="tiny-sd")
    page = str(repository.parent / "temp" / "lora-ws-scan.html")
    assert ran.code == 3
    words = ran.words[ran.words.index("scan") :]
    assert words[:7] == ["scan", "--out", page, "--policy", "p.yaml", "--model", "tiny-sd"]
    assert words[7:] == ["./--out=x.safetensors", "./a b.safetensors", "./c.ckpt"]
    assert ran.outputs == f"report={page}\n"


@posix
def test_without_a_known_base_everything_is_scanned(repository: Path) -> None:
    for base in ("0" * 40, ""):
        assert scan_step(repository, SHOW, BASE=base).words[-1] == "./old.safetensors"


@posix
def test_without_a_changed_adapter_nothing_is_scanned(repository: Path) -> None:
    base = git("rev-parse", "HEAD", cwd=repository)
    (repository / "notes.txt").write_text("x", encoding="utf-8")
    commit(repository)
    ran = scan_step(repository, SHOW, BASE=base)
    assert (ran.code, ran.words[-1], ran.outputs) == (0, "no adapter file changed", "")


@posix
@pytest.mark.slow
def test_the_action_fails_where_a_file_is_flagged(repository: Path) -> None:
    stub = f'exec "{sys.executable}" -m lora_ws "$@"'
    env = {"PYTHONPATH": str(ROOT), "LORA_WS_CACHE": str(repository.parent / "cache")}
    assert scan_step(repository, stub, BASE="", **env).code == 0
    base = git("rev-parse", "HEAD", cwd=repository)
    (repository / "bad.safetensors").write_bytes(b"<html>")
    commit(repository)
    assert scan_step(repository, stub, BASE=base, **env).code == 3


@posix
@pytest.mark.slow
def test_the_workflow_of_the_guide_fails_where_its_policy_flags(repository: Path) -> None:
    """Every step but those of other actions and the install, with the program itself."""
    guide = (ROOT / "docs" / "scan.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(on: .*?)^```", guide, re.DOTALL | re.MULTILINE)
    (job,) = yaml.safe_load(text)["jobs"].values()
    (ours,) = [step for step in job["steps"] if step.get("id") == "scan"]
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    inputs = {name: one["default"] for name, one in action["inputs"].items()} | ours["with"]
    assert {*inputs} == {*action["inputs"]}
    (step,) = [s for s in action["runs"]["steps"] if s.get("id") == "scan"]
    given = {n: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", r"{\1}", v) for n, v in step["env"].items()}
    env = {name: value.format(**inputs) for name, value in given.items()}
    env |= {"PYTHONPATH": str(ROOT), "LORA_WS_CACHE": str(repository.parent / "cache")}
    stub = f'exec "{sys.executable}" -m lora_ws "$@"'
    (repository / inputs["policy"]).write_text("classes: {flower: 0.5}\n", encoding="utf-8")
    page = repository.parent / "temp" / "lora-ws-scan.html"
    for name, code in {"bicycle": 0, "orchid": 3, "aquarium-fish": 0}.items():
        env["BASE"] = git("rev-parse", "HEAD", cwd=repository)
        file = repository / "loras" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(GOOD.with_name(file.name).read_bytes())
        commit(repository)
        assert scan_step(repository, stub, **env).code == code, name
        # What the next step uploads, whether a file was flagged or not.
        assert file.name in page.read_text(encoding="utf-8")


def test_the_hook_is_a_command_for_adapter_files() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    name, args = find_command(hook["entry"].split()[1:])
    assert (name, args) == ("scan", [])
    for suffix in (".safetensors", *PICKLED):
        assert re.search(hook["files"], f"loras/a{suffix}")
    assert not re.search(hook["files"], "notes.txt")
