"""`lora-ws reproduce`: report, records and page of a table and a figure on a small collection."""

import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from browser import open_page
from factories import small_zoo

from lora_ws import journal
from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection.card import find_card
from lora_ws.config import spec_files
from lora_ws.experiments.kinds import load_eval
from lora_ws.experiments.options import Options
from lora_ws.experiments.recipes import recipe
from lora_ws.experiments.table import run as table_run
from lora_ws.experiments.table.grids import conditions
from lora_ws.learn.spec import ExperimentSpec


class Made:
    """A table reproduced once, for all tests of this file."""

    def __init__(self, folder: Path) -> None:
        self.store, self.out = folder / "store", folder / "out"
        small_zoo(60).save(self.store)
        self.args = ["reproduce", "table1", "--dataset", str(self.store), "--out", str(self.out)]
        self.args += ["--seeds", "1", "--protocol", "clean", "--processes", "1"]

    def run(self) -> str:
        with redirect_stdout(StringIO()) as printed:
            assert main(self.args) == 0
        return printed.getvalue()


def short_recipe(*args: Any) -> ExperimentSpec:
    spec = recipe(*args)
    return replace(spec, fit=replace(spec.fit, max_epochs=3))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    made = Made(tmp_path_factory.mktemp("table"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_ws.experiments.options.recipe", short_recipe)
        cost, *_, report = made.run().splitlines()
        assert re.fullmatch(r"table1: at least \d+ minutes on two cores, .*", cost)
        assert "report.html" in report
        yield made


@pytest.mark.slow
def test_the_report_has_every_row_published_numbers_and_controls(made: Made):
    text = (made.out / "table1" / "report.md").read_text(encoding="utf-8")
    for row in ("FlatVec", "FlatVecPCA", "StatsFlatVec", "StatsLayer", "StatsLayerDense"):
        assert f"| {row} |" in text
    assert "| DeltaPCA (ours) |" in text
    assert "81.36 ± 1.07" in text
    assert "needs the Hub" in text
    for control in ("A only", "B only", "norms only", "metadata only"):
        assert f"| control: {control} |" in text
    assert "shuffled labels" in text
    latex = (made.out / "table1" / "tables.tex").read_text(encoding="utf-8")
    assert latex.count(r"\begin{tabular}") == text.count("|---|") > 3


@pytest.mark.slow
def test_the_records_behind_the_report_are_the_runs(made: Made):
    lines = journal.read(made.out / "table1" / "records.jsonl")
    runs = [
        json.loads(x)
        for f in made.out.rglob("runs/**/records.jsonl")
        for x in f.open(encoding="utf-8")
    ]
    assert len(lines) == len(runs) > 10
    assert {line["experiment"] for line in lines} >= {"table1/flat_vec", "table1/delta_pca"}


@pytest.mark.slow
def test_the_page_opens_with_all_its_pictures_and_nothing_from_elsewhere(
    made: Made, tmp_path: Path
):
    document, seen = open_page(made.out / "table1" / "report.html", tmp_path)
    assert seen["images"] == seen["shown"] == 4
    assert seen["fetched"] == []
    assert not seen["wide"], "wide tables scroll by themselves"
    assert document.count('<table class="data">') > 3


@pytest.mark.slow
def test_again_runs_nothing_and_says_the_same(made: Made):
    files = sorted(made.out.rglob("runs/**/records.jsonl"))
    before = [file.stat().st_mtime_ns for file in files]
    report = (made.out / "table1" / "report.md").read_text(encoding="utf-8")
    made.run()
    assert [file.stat().st_mtime_ns for file in files] == before
    assert (made.out / "table1" / "report.md").read_text(encoding="utf-8") == report


@pytest.mark.slow
def test_other_data_under_the_same_runs_are_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = small_zoo(60, seed=1).save(tmp_path / "other")
    flags = ["--out", str(made.out), "--seeds", "2", "--processes", "1"]
    assert main(["reproduce", "table1", "--dataset", str(other), *flags]) == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["tabel1"], "no `tabel1` in eval/, did you mean `table1`?"),
        (["table1", "--protocol", "clear"], "--protocol"),
        (
            ["table1", "--rows", '["FlatVek"]'],
            "the table has no `FlatVek`, did you mean `FlatVec`?",
        ),
        (["table1", "--processes", "0"], "processes: expected at least 1"),
        (["table1", "--dataset", "lora-ws-mimi"], "did you mean `lora-ws-mini`"),
    ],
)
def test_wrong_input_is_answered(args: list[str], text: str, capsys: pytest.CaptureFixture[str]):
    assert main(["reproduce", *args]) == 2
    assert text in capsys.readouterr().err


TABLE = """
kind: table
title: One row of our own
source: Nobody (2025)
dataset: lora-ws-mini
rows:
  - name: StatsFlatVec
    recipes: {clean: table1/stats_flat_vec}
"""


@pytest.mark.slow
def test_a_table_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "mine.yaml"
    file.write_text(TABLE, encoding="utf-8")
    monkeypatch.setattr(
        "lora_ws.config.spec_files",
        lambda folder: {"mine": file} if folder == "eval" else spec_files(folder),
    )
    store, out = small_zoo(60).save(tmp_path / "store"), tmp_path / "out"
    flags = ["--out", str(out), "--seeds", "1", "--processes", "1", "--controls", "false"]
    assert main(["reproduce", "mine", "--dataset", str(store), *flags]) == 0
    text = (out / "mine" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# mine: One row of our own\n")
    assert "| StatsFlatVec | 7 |" in text
    # As run, nobody's script can be repeated; what the paper says is the same run.
    assert "## Protocol clean" in text
    assert "## Protocol as-run" not in text
    assert len(journal.read(out / "mine" / "records.jsonl")) == 1


def test_a_protocol_without_recipes_is_answered(capsys: pytest.CaptureFixture[str]):
    ours = ["--rows", '["DeltaPCA (ours)"]', "--protocol", "as-run"]
    assert main(["reproduce", "table1", *ours]) == 2
    assert "protocol: table1 has no recipe for as-run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_class_of_two_adapters_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    zoo = small_zoo(61)
    keep = [k for k in range(61) if k % 3 or k < 4]
    store = zoo.select(keep).save(tmp_path / "store")
    flags = ["--out", str(tmp_path / "out"), "--seeds", "1", "--processes", "1"]
    assert main(["reproduce", "table1", "--dataset", str(store), *flags]) == 2
    assert "at least 3 adapters of each class, got 2 of `cat`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "columns", "split"),
    [
        ("lora-ws-mini", ["category_name", "leaf_part"], "leaf_part"),
        ("lora-ws-1k", ["category_name"], "group:leaf"),
        ("lora-ws-100k", ["category_name"], "group:leaf"),
        ("lora-ws-nsfw", ["label"], None),
    ],
)
def test_unseen_leaves_stand_beside_wherever_leaves_are_known(
    name: str, columns: list[str], split: str | None
) -> None:
    found = {one.name: one.changes for one in conditions(columns, find_card(name), "")}
    assert found.get("unseen leaves", {}).get("split") == split


def test_a_row_of_ours_is_left_out_where_its_layers_are_not() -> None:
    spec, options = load_eval("table1")[1], Options("table1", Path("unused"))
    whole = Layout.sd15_qv()
    bare = Layout(tuple(one for one in whole.layers if ".attn1." in one.name))
    names = [row.name for row in spec.rows]
    assert [row.name for row in table_run._readable(spec, options, whole).rows] == names
    kept = [name for name in names if "UpdateKernel" not in name]
    assert [row.name for row in table_run._readable(spec, options, bare).rows] == kept
