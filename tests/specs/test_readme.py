"""What README and documentation tell people to type is what works."""

import importlib
import re
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lora_ws.audit.examples import examples
from lora_ws.cli import find_command, main
from lora_ws.commands.table import described, function_of
from lora_ws.config import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "training/README.md"]


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in fenced if not language for line in block.splitlines()]
    found = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in found if line.startswith("lora-ws ") and "COMMAND" not in line]


# Of the table of all readers, those that README shows.
COLUMNS = ("constant prompt", "constant, unseen leaves", "shared start")
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
    assert callable(parse(function_of(name), args, *described(name)))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def _rows(text: str) -> dict[str, list[str]]:
    """The cells of tables by the first of their row, without bold and underline."""
    lines = [re.sub(r"\*\*|</?u>", "", line) for line in text.splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_results_of_the_readme_are_those_of_the_report() -> None:
    shown = _rows((ROOT / "README.md").read_text(encoding="utf-8"))
    report = (ROOT / "eval/results/readers/report.md").read_text(encoding="utf-8")
    measured = _rows(report[: report.index("## Against the best")])
    columns = [measured["Reader"].index(name) for name in COLUMNS]
    readers = {name: re.sub(r" \(.*\)$", "", name) for name in shown}
    known = measured.keys() - {"Reader", "---"}
    found = {name: reader for name, reader in readers.items() if reader in known}
    assert len(found) == 7
    for name, reader in found.items():
        assert shown[name] == [measured[reader][k] for k in columns], name


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, own = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copy(examples()[1].file, "file.safetensors")
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["adapters"].weights.shape == (500, 7072)
    assert round(names["record"].test["accuracy"], 2) == 0.90
    assert max(names["probabilities"], key=names["probabilities"].get) == "flower"
    made = types.ModuleType("mine")
    exec(own, vars(made))
    monkeypatch.setitem(sys.modules, "mine", made)
    quick = ["--subset", "shared/class", "--seeds", "1", "--fit.max_epochs", "1"]
    assert main(["train", "--featurizer", "mine.Peaks", *quick]) == 0
    table = text[text.index("## What you can do") : text.index("## Results")]
    for module, name in re.findall(r"`(lora_ws[\w.]*)\.(\w+)`", table):
        assert callable(getattr(importlib.import_module(module), name)), name


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "datasets/README.md"]:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
        for target in [*links, *re.findall(r'(?:href|src)="([^"#:]+)"', text)]:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_documentation_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(
        encoding="utf-8"
    )
    for name in set(re.findall(r"\bmake (\w+)", text)):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
