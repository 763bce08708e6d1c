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
from lora_ws.experiments.cad.spec import METHODS, CadSpec
from lora_ws.experiments.kinds import eval_file
from lora_ws.experiments.options import Options
from lora_ws.zoo.photos import PhotoSpec, load_photos


@pytest.fixture(scope="module")
def spec() -> CadSpec:
    full = load_spec(CadSpec, eval_file("cad"))
    return replace(full, digits=("three",), budgets=(0.1,), seeds=1, steps=4, images=1)


@pytest.mark.slow
def test_a_report_of_every_method_that_resumes(spec: CadSpec, tmp_path: Path) -> None:
    report = run(spec, Options("cad", tmp_path / "out")) / "report.html"
    file = tmp_path / "out" / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["method"] for record in records].count("none") == 1
    assert {record["method"] for record in records} == {"none", *METHODS}
    assert records[0]["target"] == 1
    # As a kill in the middle of the last line leaves it.
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:10], encoding="utf-8")
    run(spec, Options("cad", tmp_path / "out"))
    assert file.read_text(encoding="utf-8").splitlines() == lines
    with pytest.raises(ConfigError, match="holds another experiment"):
        run(replace(spec, images=2), Options("cad", tmp_path / "out"))
    dom, probe = open_page(report, tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (1, 1, [])
    assert all(method in dom for method in METHODS)


def test_digits_are_named(spec: CadSpec) -> None:
    with pytest.raises(ConfigError, match="got `ten`"):
        replace(spec, digits=("ten",))


def test_the_judge_knows_digits_at_the_size_of_the_base() -> None:
    photos, judge = load_photos(PhotoSpec(split="test"), 16), DigitJudge.train()
    assert judge.accuracy > 0.95
    truth = [NAMES.index(leaf) for leaf in photos.leaves]
    assert (judge.digits(photos.tensor()) == truth).mean() > 0.95
