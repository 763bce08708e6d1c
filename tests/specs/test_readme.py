"""What README and documentation tell people to type is what works."""

import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_ws.cli import find_command, main
from lora_ws.collection import load
from lora_ws.commands.table import function_of
from lora_ws.config import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "training/README.md"]


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in fenced if not language for line in block.splitlines()]
    found = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in found if line.startswith("lora-ws ") and "COMMAND" not in line]


EVERY = [(page.name, line) for page in PAGES for line in commands(page)]


def test_there_are_commands_to_check() -> None:
    assert len(EVERY) >= 7


@pytest.fixture
def _their_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that docs/extending.md has people write."""
    made = types.ModuleType("my_net")
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, vars(made))
    monkeypatch.setitem(sys.modules, "my_net", made)


@pytest.mark.usefixtures("_their_network")
@pytest.mark.parametrize(("page", "line"), EVERY)
def test_command_is_understood(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, args = find_command(shlex.split(line)[1:])
    assert callable(parse(function_of(name), args, prog=name))


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    quick = ["--seeds", "1", "--fit.max_epochs", "1"]
    assert main(["train", "--featurizer", "StatsFlatVec", *quick]) == 0
    zoo = load("lora-ws-mini")
    tensors = {
        f"unet.{m.layer.name}.lora.{m.role}.weight": np.array(
            zoo.weights[0, m.columns].reshape(m.shape)
        )
        for m in zoo.layout.matrices
    }
    save_file(tensors, "file.safetensors")
    names: dict[str, object] = {}
    exec(code, names)
    assert names["X"].shape == (2000, 448)  # type: ignore[attr-defined]
    assert len(names["records"]) == 2  # type: ignore[arg-type]


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "datasets/README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_documentation_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(
        encoding="utf-8"
    )
    for name in set(re.findall(r"\bmake (\w+)", text)):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
