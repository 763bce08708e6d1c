"""The experiment on sets of adapters: small, resumed, and what a slow run must show."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from browser import open_page

from lora_ws.config import load_spec
from lora_ws.diffusion.methods import Switch
from lora_ws.diffusion.turns import AdaptiveSwitch
from lora_ws.errors import ConfigError
from lora_ws.experiments.composition.run import run
from lora_ws.experiments.composition.spec import (
    METHODS,
    CompositionRecord,
    CompositionSpec,
    turns_named,
)
from lora_ws.experiments.kinds import eval_file
from lora_ws.experiments.options import Options
from lora_ws.experiments.records import SECONDS, read_record


@pytest.fixture(scope="module")
def full() -> CompositionSpec:
    return load_spec(CompositionSpec, eval_file("composition"))


@pytest.mark.slow
def test_a_report_of_every_method_that_resumes(full: CompositionSpec, tmp_path: Path) -> None:
    spec = replace(
        full,
        sizes=(5,),
        steps=2,
        images=1,
        digits=1,
        both_sizes=(5,),
        both_images=1,
        taus=(1, 2),
        adaptive=(1,),
        tau_size=5,
        cost_images=1,
    )
    report = run(spec, Options("composition", tmp_path / "out")) / "report.html"
    file = tmp_path / "out" / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    records = [read_record(CompositionRecord, json.loads(line)) for line in lines]
    turned = {turns_named(one) for one in (Switch(1), Switch(2), AdaptiveSwitch(1))}
    assert {record.method for record in records} == {*METHODS, *turned}
    sets = {(record.size, record.kind): len(record.sets) for record in records}
    # Both styles, one of 3 characters, and elements of two of the other 3 categories, 2 of each.
    both = {(5, "styles"): 3 * 3 * 2 * 2}
    assert sets == {(1, "character"): 11, (5, "character"): 48, (4, "named"): 16, **both}
    for record in records:
        if record.kind == "styles":
            assert all({"bold", "outline"} <= set(names) for names in record.sets)
    for record in records:
        images = 16 if record.size == 1 else 1
        assert record.array.shape == (len(record.sets), images, record.size)
        own = [np.mean(shown) for shown in record.shown]
        assert record.share[0] == pytest.approx(100 * mean(own))
    # As a kill in the middle of the last line leaves it.
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:10], encoding="utf-8")
    run(spec, Options("composition", tmp_path / "out"))
    again = file.read_text(encoding="utf-8").splitlines()
    last, own = (json.loads(some[-1]) for some in (lines, again))
    assert own.pop(SECONDS) > 0
    del last[SECONDS]
    assert (again[:-1], own) == (lines[:-1], last)
    with pytest.raises(ConfigError, match="holds another experiment"):
        run(replace(spec, images=2), Options("composition", tmp_path / "out"))
    dom, probe = open_page(report, tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (3, 3, [])
    assert all(method in dom for method in METHODS)
