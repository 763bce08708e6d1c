"""A committed report is what its committed records say."""

import runpy
import shutil
from pathlib import Path

import pytest

from lora_ws.experiments import trials

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "figure3"])
def test_a_report_follows_from_its_records(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "run", trials.run)  # which reports.py replaces
    committed = ROOT / "eval" / "results" / name
    shutil.copy(committed / "records.jsonl", tmp_path)
    runpy.run_path(str(ROOT / "docs" / "site" / "reports.py"))["render"](name, tmp_path)
    for file in ("report.md", "tables.tex", "records.jsonl"):
        expected = (committed / file).read_text(encoding="utf-8")
        assert (tmp_path / file).read_text(encoding="utf-8") == expected
    names = {file.name for file in committed.iterdir()}
    assert {file.name for file in tmp_path.iterdir()} == names
