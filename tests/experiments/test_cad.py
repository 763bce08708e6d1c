"""The experiment that erases digits: small, resumed, and with what it may not mix."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import open_page

from lora_ws.config import load_spec
from lora_ws.diffusion.digits import NAMES, DigitJudge
from lora_ws.errors import ConfigError
from lora_ws.experiments.cad.run import run
from lora_ws.experiments.cad.spec import METHODS, NONE, CadRecord, CadSpec, Key
from lora_ws.experiments.kinds import eval_file
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import SECONDS, read_record
from lora_ws.zoo.photos import PhotoSpec, load_photos


@pytest.fixture(scope="module")
def spec() -> CadSpec:
    full = load_spec(CadSpec, eval_file("cad"))
    less = {"seeds": 1, "steps": 4, "points": 1, "singles": 2, "images": 1, "neighbours": 1}
    return replace(full, digits=("three",), budgets=(0.1,), **less)


@pytest.mark.slow
def test_a_report_of_every_method_that_resumes(spec: CadSpec, tmp_path: Path) -> None:
    report = run(spec, Options("cad", tmp_path / "out")) / "report.html"
    file = tmp_path / "out" / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    records = [read_record(CadRecord, json.loads(line)) for line in lines]
    parts = [record.part for record in records]
    assert [parts.count(part) for part in ("scores", "edit", "amplify")] == [
        1,
        1 + len(METHODS),
        10,
    ]
    found = {record.key: record.values for record in records}
    plain = found[Key("edit", "three", NONE)]
    assert plain["shown"]["three"] == 1
    assert (plain["changed"], plain["moved"], plain["true"]) == (0, 0, 0)
    assert {key.method for key in found if key.part == "edit"} == {NONE, *METHODS}
    for key, values in found.items():
        if key.part == "edit":
            assert set(values["shown"]) == set(NAMES)
            assert set(values["wordings"]) == set(spec.wordings)
    # Setting all weights of a share to 0 cannot hold more than all of the score.
    for held in found[Key("scores", "three")]["concentration"].values():
        assert held == sorted(held)
        assert held[-1] <= 1 + 1e-9
    # As a kill in the middle of the last line leaves it.
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:10], encoding="utf-8")
    run(spec, Options("cad", tmp_path / "out"))
    again = file.read_text(encoding="utf-8").splitlines()
    last, own = (json.loads(some[-1]) for some in (lines, again))
    assert own.pop(SECONDS) > 0
    del last[SECONDS]
    assert (again[:-1], own) == (lines[:-1], last)
    with pytest.raises(ConfigError, match="holds another experiment"):
        run(replace(spec, images=2), Options("cad", tmp_path / "out"))
    dom, probe = open_page(report, tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (2, 2, [])
    assert all(method in dom for method in METHODS)
    assert "out of reach" in dom


def test_digits_are_named(spec: CadSpec) -> None:
    with pytest.raises(ConfigError, match="got `ten`"):
        replace(spec, digits=("ten",))


def test_the_judge_knows_digits_at_the_size_of_the_base() -> None:
    photos, judge = load_photos(PhotoSpec(split="test"), 16), DigitJudge.train()
    assert judge.accuracy > 0.95
    truth = [NAMES.index(leaf) for leaf in photos.leaves]
    assert (judge.digits(photos.tensor()) == truth).mean() > 0.95
