"""The experiment on attribution: small, resumed, its numbers where they must lie."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import open_page
from tolerances import EXACT

from lora_ws.config import load_spec, spec_file
from lora_ws.errors import ConfigError
from lora_ws.experiments.attribution.run import run
from lora_ws.experiments.attribution.spec import (
    CACHED,
    INVERTED,
    ORIGINAL,
    STAGES,
    UNGUIDED,
    AttributionSpec,
)
from lora_ws.experiments.options import Options


@pytest.fixture(scope="module")
def spec() -> AttributionSpec:
    full = load_spec(AttributionSpec, spec_file("eval", "attribution"))
    small = {"digits": ("three", "seven"), "pictures": dict.fromkeys(STAGES, 2), "steps": 4}
    less = {"dictionary": 2, "dictionary_steps": 4, "left": (2, 4), "levels": 2}
    return replace(full, **small, **less, fixed_point_iters=2)


@pytest.mark.slow
def test_a_report_of_every_stage_that_resumes(spec: AttributionSpec, tmp_path: Path) -> None:
    report = run(spec, Options("attribution", tmp_path / "out")) / "report.html"
    file = tmp_path / "out" / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    found = {r["stage"]: r["values"] for r in map(json.loads, lines)}
    assert list(found) == list(STAGES)
    assert sum(found["ablation"]["shares"]) == pytest.approx(1)
    assert sum(found["ablation"]["first"]) == 2
    # All blocks change on trajectories of their own; at the same latents the first cannot.
    assert found["blocks"]["forced"][0] < EXACT < found["blocks"]["free"][0]
    assert found["blocks"]["safe"][0] is True
    # No adapter is a configuration too.
    assert found["blocks"]["free"][1] > 0.01
    assert found["sparse codes"]["vectors"] == 2 * 2 * 2
    rows = {(way, left): rest for way, left, *rest in found["inversion"]["rows"]}
    assert list(rows) == [
        *((CACHED, 2), (CACHED, 4), (INVERTED, 2), (INVERTED, 4)),
        *((UNGUIDED, 2), (ORIGINAL, 2), (UNGUIDED, 4), (ORIGINAL, 4)),
    ]
    # In float32, and a correlation is off by the square of that: any bound far from 1 would do.
    assert rows[CACHED, 4][:2] == pytest.approx([1, 1], abs=1e-4)
    assert rows[CACHED, 2][1] < 0.99
    errors = found["inversion"]["errors"]
    assert errors[CACHED] == 0 < errors[INVERTED] < errors[UNGUIDED]
    # The identity of norms: the same adapter in every box, whatever is in it.
    shares = found["boxes"]["norm"]["shares"]
    # Exact in float64 (test_boxes); here a U-Net in float32, far below what boxes differ by.
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert all(sum(column) == 2 for column in found["boxes"]["owners"])
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:10], encoding="utf-8")
    run(spec, Options("attribution", tmp_path / "out"))
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(lines)
    with pytest.raises(ConfigError, match="holds another experiment"):
        run(replace(spec, steps=9), Options("attribution", tmp_path / "out"))
    dom, probe = open_page(report, tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (2, 2, [])
    assert "94.1 %" in dom
    assert dom.count("not reproduced") > 1
    assert "out of reach" in dom


def test_pictures_are_one_of_each_digit_then_one_more(spec: AttributionSpec) -> None:
    more = replace(spec, pictures=dict.fromkeys(STAGES, 3))
    drawn = [("a photo of three", 0), ("a photo of seven", 0), ("a photo of three", 1)]
    assert more.drawn("boxes") == drawn
    assert spec.drawn("boxes") == drawn[:2]


WRONG = {
    "a digit": ({"digits": ("ten",)}, "got `ten`"),
    "scales": ({"mixture": (1.0,)}, "mixture: expected 3 scales, got 1"),
    "stages": ({"pictures": {"boxes": 1}}, "pictures: expected a number for ablation, blocks"),
    "boxes": ({"boxes": {"sun": (0, 0, 1, 1)}}, "boxes: expected one for each adapter, got sun"),
    "left": ({"left": (0,)}, "left: expected 1 to 4 steps"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_named(wrong: str, spec: AttributionSpec) -> None:
    change, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text):
        replace(spec, **change)


def test_adapters_are_those_of_the_testbed(spec: AttributionSpec, tmp_path: Path) -> None:
    boxes = {"bold": (0, 0, 1, 1), "sun": (0, 0, 1, 1), "moon": (0, 0, 1, 1)}
    unknown = replace(spec, adapters=tuple(boxes), boxes=boxes)
    with pytest.raises(ConfigError, match="got `moon`"):
        run(unknown, Options("attribution", tmp_path / "out"))
