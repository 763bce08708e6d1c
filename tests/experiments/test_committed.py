"""Committed reports are, byte for byte, what the code makes of the committed records.

Not compared: pictures, which are not drawn again, and HTML pages but for their style.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_ws.experiments.attribution import report as attribution
from lora_ws.experiments.attribution.spec import AttributionRecord
from lora_ws.experiments.cad import report as cad
from lora_ws.experiments.cad.spec import CadRecord
from lora_ws.experiments.composition import report as composition
from lora_ws.experiments.composition.spec import CompositionRecord, CostRecord
from lora_ws.experiments.kinds import eval_file, load_eval, run_eval, trained
from lora_ws.experiments.layers import report as layers
from lora_ws.experiments.options import Options
from lora_ws.experiments.principal_components import report as principal_components
from lora_ws.experiments.recipes import Protocol
from lora_ws.experiments.records import SECONDS, read_record
from lora_ws.experiments.table import report as table
from lora_ws.experiments.table import run as table_run
from lora_ws.experiments.transfer import report as transfer
from lora_ws.experiments.transfer.spec import TransferRecord, ZooRecord
from lora_ws.experiments.trials import NOT_APPLICABLE, Trial
from lora_ws.report.page import Section, script, style, write_report

RESULTS = eval_file("table1").parent / "results"
# Chosen by, and drawn from, runs of single layers, whose records are not committed.
OF_OTHER_RECORDS = ("The chosen layers", "Nested cross-validation", "Curves")


def lines(name: str, file: str = "records") -> list[str]:
    return (RESULTS / name / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()


def records(name: str, kind: type, file: str = "records") -> dict[Any, Any]:
    made = [read_record(kind, json.loads(line)) for line in lines(name, file)]
    return {record.key: record for record in made}


def runs_again(name: str, out: Path) -> Options:
    """What ``lora-ws reproduce`` finds after a run: records in a folder per trial, and pictures."""
    found = defaultdict(list)
    for line in lines(name):
        found[json.loads(line)["experiment"]].append(line)
    for experiment, own in found.items():
        folder = out / "runs" / experiment
        folder.mkdir(parents=True)
        (folder / "records.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    copy_pictures(name, out / name)
    return Options(name, out)


def copy_pictures(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    for picture in RESULTS.glob(f"{name}/*.png"):
        shutil.copy(picture, folder)


def test_committed_pages_have_the_style_of_all_pages() -> None:
    pages = sorted(RESULTS.glob("*/report.html"))
    assert len(pages) >= 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        # `python docs/site/restyle.py` gives it to them.
        assert f"<style>{style()}</style>" in text, page
        assert f"<script>{script()}</script>" in text, page


def undrawn(monkeypatch: pytest.MonkeyPatch, module: Any, *functions: str, at: int = 1) -> None:
    for function in functions:
        monkeypatch.setattr(module, function, lambda *args, **more: args[at])


def assert_committed(name: str, folder: Path, *more: str) -> None:
    for file in ("report.md", "tables.tex", *more):
        assert (folder / file).read_bytes() == (RESULTS / name / file).read_bytes(), file


@pytest.mark.slow
def test_table1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch, table, "chart_bars", "chart_curves", "_map")
    undrawn(monkeypatch, table, "plot_confusion", at=2)
    folder = run_eval(runs_again("table1", tmp_path))
    assert_committed("table1", folder, "records.jsonl")


def test_the_list_of_networks_gives_the_accuracies_of_the_readers_page() -> None:
    page = (RESULTS / "readers/report.md").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for line in re.findall(r"^\| (.+) \|$", page, re.MULTILINE):
        name, *cells = re.sub(r"\*\*|</?u>", "", line).split(" | ")
        if len(cells) == 5:
            found.setdefault(name, f"{cells[1]} / {cells[3]}")
    readers = {r.recipe: found[r.name] for r in load_eval("readers")[1].readers if not r.shuffled}
    text = (RESULTS.parents[1] / "lora_ws/models/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `\w+` \|.*training/(\S+)\.yaml\) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 12
    assert dict(rows) == {recipe: readers[recipe] for recipe, _ in rows}


@pytest.mark.parametrize(
    ("records", "heading", "cells"),
    [
        ("learning_curve", "## With more adapters", 70),
        ("learning_curve_class", "### With the class in the prompt", 50),
    ],
)
def test_the_learning_curve_says_what_its_records_say(
    records: str, heading: str, cells: int
) -> None:
    errors = defaultdict(list)
    for line in map(json.loads, lines(records)):
        share = 100 * int(line["wrong"], 16).bit_count() / line["tested"]
        errors[line["split"], line["reader"], line["size"]].append(share)
    text = (RESULTS.parents[1] / "docs/readers.md").read_text(encoding="utf-8")
    _, *parts = text.split(heading)[1].split("\n###")[0].split("unseen, ")
    seen = 0
    for split, part in zip(("part", "leaf_part"), parts, strict=True):
        head, *rows = re.findall(r"^(?:\| )?(.+) \|$", part, re.MULTILINE)
        sizes = [int(size.replace(" ", "")) for size in head.split(" | ")[1:]]
        for row in rows[:5]:
            name, *shown = row.replace("`", "").split(" | ")
            for size, cell in zip(sizes, shown, strict=True):
                found = errors.get((split, name, size), [])
                spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
                expected = f"{np.mean(found):.1f}{spread}" if found else "–"
                assert cell == expected, (name, size)
                seen += bool(found)
    assert seen == len(errors) == cells


@pytest.mark.slow
def test_table2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(
        plan: Mapping[Protocol, Mapping[str, Trial]], processes: int, nested: object
    ) -> tuple[dict[Protocol, dict[str, Trial]], list[Section]]:
        chosen = {
            protocol: {
                name: replace(
                    trial, folder=trial.folder / ("" if protocol == "as-run" else "chosen")
                )
                for name, trial in rows.items()
            }
            for protocol, rows in plan.items()
        }
        return chosen, []

    monkeypatch.setattr(table_run, "choose_layers", choose)
    monkeypatch.setattr(table_run, "detection_sections", lambda *args: [])
    undrawn(monkeypatch, table, "chart_bars", "chart_curves", "_map")
    undrawn(monkeypatch, table, "plot_confusion", at=2)
    folder = run_eval(runs_again("table2", tmp_path))
    text = (RESULTS / "table2/report.md").read_text(encoding="utf-8")
    # Learning curves need more than records.
    held = re.sub(r"!\[[^]]*\]\(curves\.png\)\n\n\*[^*]*\*\n\n", "", text).split("\n## ")
    kept = [part.strip() for part in held if not part.startswith(OF_OTHER_RECORDS)]
    assert len(kept) == len(held) - len(OF_OTHER_RECORDS)
    made = (folder / "report.md").read_text(encoding="utf-8").split("\n## ")
    assert [part.strip() for part in made] == kept
    assert (folder / "records.jsonl").read_bytes() == (
        RESULTS / "table2/records.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_figure2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch, layers, "sweep_chart", at=2)
    folder = run_eval(runs_again("figure2", tmp_path))
    numbers = [f"{over}.csv" for over in ("layers", "matrices", "all_but_top")]
    assert_committed("figure2", folder, "records.jsonl", *numbers)


def test_figure3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch, principal_components, "chart_lines")
    options = runs_again("figure3", tmp_path)
    home = options.run_folder("figure3/flat_vec_pca")
    for k in load_eval("figure3")[1].components:
        if not (home / f"k{k}").is_dir():
            (home / f"k{k}").mkdir()
            (home / f"k{k}" / NOT_APPLICABLE).write_text(
                "not applicable: rank 349\n", encoding="utf-8"
            )
    assert_committed("figure3", run_eval(options), "records.jsonl")


@pytest.mark.parametrize("name", trained())
def test_what_a_run_takes_is_what_the_records_say(name: str) -> None:
    found = [json.loads(line) for line in lines(name)]
    # Features are made once for all seeds.
    features = {(r["experiment"], r["protocol"]): r["feature_seconds"] for r in found}
    seconds = sum(r["seconds"] for r in found) + sum(features.values())
    assert load_eval(name)[1].cpu_minutes == pytest.approx(seconds / 60, abs=0.05)


def test_attribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch, attribution, "chart_trade")
    _, spec = load_eval("attribution")
    done = {key: r.values for key, r in records("attribution", AttributionRecord).items()}
    folder = tmp_path / "report"
    copy_pictures("attribution", folder)
    write_report(folder, spec.title, attribution.attribution_sections(spec, done, folder))
    assert_committed("attribution", folder)


def test_cad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch, cad, "chart_lines")
    _, spec = load_eval("cad")
    text = (RESULTS / "cad/report.md").read_text(encoding="utf-8")
    # Of the judge, which is trained in every run.
    (accuracy,) = re.findall(r"right on ([\d.]+) % of real digits", text)
    folder = tmp_path / "report"
    copy_pictures("cad", folder)
    done = {key: record.values for key, record in records("cad", CadRecord).items()}
    sections = cad.cad_sections(spec, done, float(accuracy) / 100, folder)
    write_report(folder, spec.title, sections)
    assert_committed("cad", folder)


@pytest.mark.parametrize("name", ["transfer", "transfer_base"])
def test_transfer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch, transfer, "chart_tables", at=3)
    _, spec = load_eval(name)
    folder = tmp_path / "report"
    copy_pictures(name, folder)
    zoos = records(name, ZooRecord, "zoos").values()
    found = sorted(
        records(name, TransferRecord).values(),
        key=lambda one: [reader.name for reader in spec.readers].index(one.reader),
    )
    sections = transfer.transfer_sections(spec, found, list(zoos), folder)
    write_report(folder, f"{name}: {spec.title}", sections)
    assert_committed(name, folder)
    # The guide says what the report says of three readers: at home and away, factor by factor.
    report = (RESULTS / name / "report.md").read_text(encoding="utf-8")
    shown = []
    for reader in (
        "UpdateKernel of attn2.to_v > SVC",
        "left Gram",
        "DeltaPCA > logistic regression",
    ):
        shown += re.findall(rf"^\| {re.escape(reader)} \| (.+) \|$", report, re.MULTILINE)[:2]
    columns = [re.sub(r"\*\*|</?u>", "", row).split(" | ") for row in shown]
    guide = (RESULTS.parents[1] / "docs/robustness.md").read_text(encoding="utf-8")
    for factor, expected in zip(spec.factors, zip(*columns, strict=True), strict=True):
        row = next(line for line in guide.splitlines() if line.startswith(f"| {factor}: "))
        assert tuple(row.replace("**", "").strip("| ").split(" | ")[1:]) == expected


@pytest.mark.parametrize(("name", "page"), [("cad", "concepts"), ("composition", "composition")])
def test_the_guide_has_every_statement_of_the_report(name: str, page: str) -> None:
    text = (RESULTS / name / "report.md").read_text(encoding="utf-8")
    _, table = text.split("## What the paper states\n\n")
    rows = table.split("\n\n")[0].splitlines()
    assert len(rows) > 10
    guide = (RESULTS.parents[1] / f"docs/{page}.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in guide


@pytest.mark.parametrize("name", ["cad"])
def test_what_drawing_takes_is_what_the_records_say(name: str) -> None:
    seconds = sum(json.loads(line)[SECONDS] for line in lines(name))
    said = load_eval(name)[1].cpu_minutes
    # The readers were trained beside other work: said is their CPU time, records have the wall's.
    assert (
        said < seconds / 60 if name == "readers" else said == pytest.approx(seconds / 60, abs=0.05)
    )


def test_what_composing_takes_is_estimated_from_the_records() -> None:
    costs = {(c["method"], c["size"]): c for c in map(json.loads, lines("composition", "costs"))}
    _, spec = load_eval("composition")

    def alone(record: dict[str, Any]) -> float:
        """Seconds to draw the images of a record as costs are measured; turns cost the same."""
        name = record["method"].split(",")[0]
        each = costs[name, max(record["size"], 2)]["seconds"] / spec.cost_images
        return each * sum(map(len, record["shown"]))

    found = list(map(json.loads, lines("composition")))
    known = [record for record in found if SECONDS in record]
    said = sum(record[SECONDS] for record in known)
    share = said / sum(map(alone, known))
    seconds = said + share * sum(alone(record) for record in found if SECONDS not in record)
    seconds += sum(cost[SECONDS] for cost in costs.values())
    assert spec.cpu_minutes == pytest.approx(seconds / 60, abs=0.05)


def test_composition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch, composition, "chart_lines")
    _, spec = load_eval("composition")
    text = (RESULTS / "composition/report.md").read_text(encoding="utf-8")
    # Of the judge, which is trained in every run.
    (right,) = re.findall(r"the machines are right on (.*)\.$", text, re.MULTILINE)
    accuracy = {name: float(v) / 100 for v, name in re.findall(r"([\d.]+) % \(([\w ]+)\)", right)}
    folder = tmp_path / "report"
    copy_pictures("composition", folder)
    done = records("composition", CompositionRecord)
    costs = records("composition", CostRecord, "costs")
    sections = composition.composition_sections(spec, done, costs, accuracy, folder)
    write_report(folder, spec.title, sections)
    assert_committed("composition", folder)
