"""The experiment on attribution: small, resumed, its numbers where they must lie."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import open_page
from tolerances import EXACT

from lora_ws.config import load_spec, spec_file
from lora_ws.errors import ConfigError
from lora_ws.experiments.attribution.run import STAGES, run
from lora_ws.experiments.attribution.spec import AttributionSpec
from lora_ws.experiments.options import Options


@pytest.fixture(scope="module")
def spec() -> AttributionSpec:
    full = load_spec(AttributionSpec, spec_file("eval", "attribution"))
    return replace(full, digits=("three", "seven"), seeds=1, steps=4, starts=(0.0, 0.5), resume=2)


@pytest.mark.slow
def test_a_report_of_every_stage_that_resumes(spec: AttributionSpec, tmp_path: Path) -> None:
    report = run(spec, Options("attribution", tmp_path / "out")) / "report.html"
    file = tmp_path / "out" / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    found = {r["stage"]: r["values"] for r in map(json.loads, lines)}
    assert list(found) == list(STAGES)
    assert sum(found["ablation"]["shares"]) == pytest.approx(1)
    assert sum(found["ablation"]["first"]) == 2
    (true, late) = found["late start"]["rows"]
    assert true[:5] == pytest.approx([0, 1, 1, 1, 1])
    assert late[1] < 0.7
    assert late[3] < 0.99
    # All blocks change on trajectories of their own; at the same latents the first cannot.
    assert found["blocks"]["forced"][0] < EXACT < found["blocks"]["free"][0]
    assert found["blocks"]["safe"][0] is True
    cached = found["inversion"]["rows"]["cached, from step 0"]
    # In float32, and a correlation is off by the square of that: any bound far from 1 would do.
    assert cached[:2] == pytest.approx([1, 1], abs=1e-4)
    # The identity of norms: the same adapter in every box, whatever is in it.
    shares = found["boxes"]["norm"]["shares"]
    # Exact in float64 (test_boxes); here a U-Net in float32, far below what boxes differ by.
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:10], encoding="utf-8")
    run(spec, Options("attribution", tmp_path / "out"))
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(lines)
    with pytest.raises(ConfigError, match="holds another experiment"):
        run(replace(spec, steps=9), Options("attribution", tmp_path / "out"))
    dom, probe = open_page(report, tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (2, 2, [])
    assert "94.1 %" in dom


WRONG = {
    "a digit": ({"digits": ("ten",)}, "got `ten`"),
    "scales": ({"mixture": (1.0,)}, "expected 3 scales, got 1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_named(wrong: str, spec: AttributionSpec) -> None:
    change, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text):
        replace(spec, **change)


def test_adapters_are_those_of_the_testbed(spec: AttributionSpec, tmp_path: Path) -> None:
    unknown = replace(spec, adapters=("bold", "sun", "moon"))
    with pytest.raises(ConfigError, match="got `moon`"):
        run(unknown, Options("attribution", tmp_path / "out"))
