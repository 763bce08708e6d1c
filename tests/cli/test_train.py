"""`lora-ws train` without a reader named: which ones, on which rows, and what is left behind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lora_ws.cli import main
from lora_ws.collection import load
from lora_ws.collection.card import find_card
from lora_ws.config import load_spec, spec_file
from lora_ws.experiments.readers.spec import ReadersSpec
from lora_ws.experiments.recipes import BEST, names_no_reader, readers
from lora_ws.featurizers import PAPER, StatsLayer
from lora_ws.learn.spec import ExperimentSpec, FitSpec, TrainerSpec

ROOT = Path(__file__).parents[2]


def test_plain_readers_are_the_papers_and_the_best_of_the_committed_report() -> None:
    spec = ExperimentSpec(subset="shared/class", split="leaf_part", seeds=4)
    found = readers(spec)
    assert list(found) == [kind.__name__ for kind in PAPER] + list(BEST)
    for own in found.values():
        assert (own.dataset, own.subset, own.split) == (spec.dataset, "shared/class", "leaf_part")
    assert [own.seeds for own in found.values()] == [4] * 5 + [1, 4], "one where nothing is drawn"
    # Of those that leave validation rows alone, the kernel and the network with the highest mean
    # test accuracy on the main subset.
    lines = (ROOT / "eval/results/readers/records.jsonl").read_text(encoding="utf-8").splitlines()
    scores = dict[str, list[float]]()
    for line in map(json.loads, lines):
        recipe, _, where = line["experiment"].partition("/recipe")
        if where == "/per_adapter-constant-part" and not line.get("refit"):
            scores.setdefault(recipe, []).append(line["test"]["accuracy"])
    spec_of_page = load_spec(ReadersSpec, spec_file("eval", "readers"))
    for group, title in zip(("kernels", "networks over factors"), BEST, strict=True):
        rows = {row.recipe: row.name for row in spec_of_page.groups[group] if row.recipe in scores}
        best = max(rows, key=lambda recipe: np.mean(scores[recipe]))
        assert (rows[best], best) == (title, BEST[title])


def test_a_reader_that_is_named_is_trained_alone() -> None:
    for spec in (
        ExperimentSpec(featurizer=StatsLayer()),
        ExperimentSpec(metadata=("rank",)),
    ):
        assert list(readers(spec).values()) == [spec]
    for spec in (
        ExperimentSpec(fit=FitSpec(max_epochs=1)),
        ExperimentSpec(matrices=("*.attn2.to_v",)),
        ExperimentSpec(trainer=TrainerSpec(engine="batched")),
    ):
        assert len(readers(spec)) == 5, "the others have settings of their own"
    assert not names_no_reader(replace(ExperimentSpec(), task="regression", label="rank"))


def test_the_oracle_of_the_card_is_that_of_the_readers_page() -> None:
    page = yaml.safe_load(spec_file("eval", "readers").read_text(encoding="utf-8"))
    known = find_card("lora-ws-mini").references["image oracle"]
    values = page["measured_elsewhere"]["image oracle"]
    for column, value in zip(page["columns"], values, strict=True):
        assert 100 * known[column.get("split", "part")] == value


@pytest.mark.slow
def test_plain_train_is_one_table_and_one_page_and_what_is_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "runs/lora-ws-mini/per_adapter/constant"
    table = (folder / "table.md").read_text(encoding="utf-8")
    names = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if line[:1] == "|"]
    assert names[2:] == [*(kind.__name__ for kind in PAPER), *BEST, "chance", "image oracle"]
    assert said.count("Accuracy") == 1
    assert f"Open {(folder / 'report.html').relative_to(tmp_path)}" in said
    assert len(said.partition("Next:")[2].strip().splitlines()) == 6
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert main(["train", "--seeds", "1"]) == 0
    again = {file for file, time in files.items() if file.stat().st_mtime_ns != time}
    assert {file.name for file in again} - {"table.md"} == set() or all(
        file.parent.name == "bundle" for file in again - {folder / "table.md"}
    )
    assert load("lora-ws-mini").card.main_subset == "per_adapter/constant"
