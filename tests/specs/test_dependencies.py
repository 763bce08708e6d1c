"""What is installed is used, explained, and imported no earlier than it is needed."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
REQUIREMENTS = [
    re.split(r"[\[<>=]", line)[0]
    for line in [
        *PROJECT["dependencies"],
        *(x for e in ("diffusion", "audit", "serve", "tune", "ray") for x in EXTRAS[e]),
    ]
]


IMPORT = re.compile(r"^( *)(?:import|from) (\w+)", re.MULTILINE)


@pytest.fixture(scope="module")
def imports() -> set[tuple[bool, str]]:
    """Packages that the library imports, and whether as soon as a module of it is imported."""
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "lora_ws").rglob("*.py")]
    return {(not indent, name) for text in texts for indent, name in IMPORT.findall(text)}


def test_every_dependency_is_imported(imports: set[tuple[bool, str]]) -> None:
    needed = {MODULES.get(name, name) for name in REQUIREMENTS}
    assert needed - {name for _, name in imports} == set()


def test_every_dependency_is_explained() -> None:
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    assert [name for name in REQUIREMENTS if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.parametrize("package", ["wandb", "datasets", "optuna"])
def test_rare_packages_are_imported_when_they_are_used(
    package: str, imports: set[tuple[bool, str]]
) -> None:
    assert (True, package) not in imports


def test_pinned_releases_need_no_other_release_of_each_other() -> None:
    """Pip would try every older release, then give up, on a machine without any of them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    needs = [
        (item.name, Requirement(line))
        for item in distributions()
        for line in item.metadata.get_all("Requires-Dist") or ()
        if "extra ==" not in line
    ]
    refused = [
        f"{name} needs {need}, constraints.txt pins {pin}"
        for name, need in needs
        if (pin := pins.get(canonicalize_name(need.name))) and pin not in need.specifier
        if need.marker is None or need.marker.evaluate()
    ]
    assert len(needs) > len(pins)
    assert refused == []
