"""No import runs upward: a module imports from its own folder or from lower floors."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lora_ws"
FLOORS = {
    "errors": 0,
    "flags": 0,
    "parameters": 1,
    "system": 0,
    "addresses": 1,
    "config": 1,
    "hub": 1,
    "memory": 1,
    "journal": 1,
    "threads": 1,
    "workers": 1,
    "functional": 1,
    "adapters": 2,
    "report": 2,
    "collection": 3,
    "diffusion": 3,
    "featurizers": 3,
    "models": 3,
    "bundle": 4,
    "attribution": 4,
    "concepts": 4,
    "composition": 4,
    # On no higher floor than `learn`: files are judged by what training left, never by training.
    "audit": 5,
    "zoo": 5,
    "learn": 6,
    "web": 6,
    "experiments": 7,
    "commands": 8,
    "cli": 9,
}
MODULES = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem in FLOORS]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, and what it imports from each."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_rooms(path: Path) -> set[str]:
    names = imported(path)
    return {name.split(".")[1] for name in names if name.startswith("lora_ws.")}


def test_every_room_has_a_floor() -> None:
    # A folder that was renamed may stay behind with what was compiled of it.
    folders = {p.name for p in PACKAGE.iterdir() if any(p.rglob("*.py")) and p.name[0] != "_"}
    files = {p.stem for p in PACKAGE.glob("*.py") if not p.name.startswith("_")}
    assert folders | files == set(FLOORS)


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(module: Path) -> None:
    here = room(module)
    for other in imported_rooms(module) - {here}:
        assert FLOORS[other] < FLOORS[here], f"{here} imports {other}"


def module_of(path: Path) -> str:
    return "lora_ws." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.slow
def test_no_module_imports_itself_in_a_circle() -> None:
    names = {module_of(path): path for path in MODULES if path.stem != "__init__"}
    imports = {name: imported(path) & set(names) for name, path in names.items()}
    while leaves := {name for name, needs in imports.items() if not needs & set(imports)}:
        imports = {name: needs for name, needs in imports.items() if name not in leaves}
    assert not imports, f"circle among {sorted(imports)}"
