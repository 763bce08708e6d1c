"""Every benchmark can be started: what it imports is there."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BENCHMARKS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "common")


@pytest.mark.slow
def test_every_benchmark_imports_what_there_is() -> None:
    # In a process of its own, as `common` and others are found beside the script.
    code = f"import runpy, sys; sys.path.insert(0, {str(FOLDER)!r})\n"
    code += f"for name in {BENCHMARKS}: runpy.run_path(f'{FOLDER}/{{name}}.py', run_name=name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
