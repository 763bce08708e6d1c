"""Every benchmark imports what there is and runs; the page of performance tells what they found."""

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from warm import Warm

FOLDER = Path(__file__).parents[2] / "benchmarks"
SHARED = ("common", "published", "results")
BENCHMARKS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in SHARED)
# What most of them import, once for all.
LIBRARIES = (
    *("lora_ws.learn.run", "lora_ws.diffusion.bank", "datasets", "peft", "sklearn.svm"),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
)
# Each in a process of its own.
CODE = """
import os, runpy, sys
script, record, folder = sys.argv[1:]
os.chdir(folder)
sys.argv = [script, "--quick", "--record", record]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def results() -> Any:
    spec = importlib.util.spec_from_file_location("results", FOLDER / "results.py")
    assert spec
    assert spec.loader
    sys.modules["results"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["results"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with Warm(tmp_path_factory.mktemp("benchmarks"), *LIBRARIES) as parent:
        yield parent


@functools.cache
def defined(module: str) -> set[str]:
    """What a module of ours says at its top, and its submodules; nothing if there is no such."""
    folder = FOLDER.parent.joinpath(*module.split("."))
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    names = {path.stem for path in folder.glob("*") if path.suffix in ("", ".py")}
    if not file.is_file():
        return names
    text = file.read_text(encoding="utf-8")
    names |= set(re.findall(r"^(?:class |def |async def )?(\w+)", text, re.MULTILINE))
    # Also what it imports, lazily too.
    imported = re.findall(r"^ *from [\w.]+ import (\([^)]*\)|.*)$", text, re.MULTILINE)
    return names | set(re.findall(r"\w+", " ".join(imported)))


def test_every_benchmark_imports_what_there_is() -> None:
    missing = []
    for name in (*BENCHMARKS, *SHARED):
        for node in ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "lora_ws":
                names = {alias.name for alias in node.names} - defined(str(node.module))
                missing += [f"{name}.py: {node.module}.{one}" for one in names]
    assert missing == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_at_its_smallest_size(
    name: str, results: Any, started: Warm, tmp_path: Path
) -> None:
    record = tmp_path / "results.jsonl"
    arguments = (str(FOLDER / f"{name}.py"), str(record), str(tmp_path))
    if name == "hub_bytes":  # The Hub's client reads where the Hub is when it is imported.
        subprocess.run([sys.executable, "-c", CODE, *arguments], check=True)
    else:
        started.run(CODE, *arguments)
    found = results.read(record) if record.exists() else []
    assert all(one.quick and one.script == f"{name}.py" for one in found)
    assert all(min(one.ratios) > 0 for one in found)


def test_the_page_tells_what_was_measured(results: Any) -> None:
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.rendered(page, results.read()) == page, "run python benchmarks/results.py"


def test_what_was_measured_names_a_benchmark(results: Any) -> None:
    assert {Path(one.script).stem for one in results.read()} <= set(BENCHMARKS)


def test_the_last_full_result_of_each_processor_counts(results: Any, tmp_path: Path) -> None:
    first = results.Result("sorting", "numpy", "sort.py", (2.0,), processor="A", date="2026-01-02")
    later = replace(first, ratios=(3.0, 4.0, 5.0), date="2026-01-03", turns=5, goal=4.5)
    other = replace(first, processor="B")
    quick = replace(first, ratios=(9.0,), quick=True)
    file = tmp_path / "results.jsonl"
    results.add([first, other], file)
    results.add([later, quick], file)
    assert results.newest(results.read(file)) == [later, other]
    table = results.table(results.read(file))
    row, same = table.splitlines()[2:]
    assert row.startswith("| sorting (`sort.py`) | numpy | 3 < **4** < 5 |")
    assert "4.5 **missed**" in row
    assert "A, 2026-01-03, 5 turns" in row
    assert same.startswith("|  |  | **2** |")
