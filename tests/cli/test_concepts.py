"""`concepts erase` and `amplify` as users meet them."""

import json
from pathlib import Path

import pytest
import torch
from browser import open_page

from lora_ws.cli import main
from lora_ws.concepts.edit import SparseEdit
from lora_ws.concepts.objective import (
    amplify_objective,
    eligible_weights,
    erase_objective,
)
from lora_ws.concepts.scores import integrated
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import generate, load_pipeline

ERASE = (
    "erase",
    "--base",
    "digit-sd",
    "--concept",
    "a photo of one",
    "--seeds",
    "1",
    "--steps",
    "6",
)
AMPLIFY = ("amplify", *ERASE[1:5], "--images", "2", "--steps", "6")


def run(*args: object) -> int:
    return main(["concepts", *map(str, args)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "budget"),
    [
        pytest.param((*ERASE, "--preserve", "a photo of six"), 0.02, marks=pytest.mark.slow),
        (AMPLIFY, 0.01),
    ],
)
def test_an_edit_is_kept_with_its_controls_and_a_page(
    args: tuple[str, ...], budget: float, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(*args, "--budget", budget, "--out", out) == 0
    told = json.loads((out / "edit.json").read_text(encoding="utf-8"))
    own, random, largest = told["outcomes"]
    assert own["changed"] == random["changed"] == largest["changed"]
    edit = SparseEdit.load(out / "edit.safetensors")
    pipeline = load_pipeline("digit-sd")
    ff = [w for n, w in pipeline.unet.named_parameters() if ".ff." in n and w.ndim == 2]
    # A matrix with fewer weights that speak for it gives fewer.
    assert 0.9 * budget * sum(w.numel() for w in ff) <= edit.changed == own["changed"]
    edit.apply(pipeline.unet)
    assert sum(int((w == 0).sum()) for w in ff) == edit.changed
    if args[0] == "erase":
        assert own["true"] > random["true"]
    dom, probe = open_page(out / "edit.html", tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (1, 1, [])
    assert "correlation" in dom


@pytest.mark.slow
@pytest.mark.parametrize("args", [ERASE, pytest.param(AMPLIFY, marks=pytest.mark.slow)])
def test_scores_may_be_integrated(args: tuple[str, ...], tmp_path: Path) -> None:
    assert run(*args, "--budget", 0.02, "--scores", "integrated", "--out", tmp_path) == 0
    edit = SparseEdit.load(tmp_path / "edit.safetensors")
    told = json.loads((tmp_path / "edit.json").read_text(encoding="utf-8"))
    assert told["scores"] == edit.facts["scores"] == "integrated"
    pipeline, prompt = load_pipeline("digit-sd"), "a photo of one"
    if args[0] == "erase":
        objective = erase_objective(pipeline, prompt, seeds=[0], steps=6)
    else:
        images = generate(pipeline, GenerationSpec(prompt), images=2)
        objective = amplify_objective(pipeline, prompt, images, steps=6)
    scores = integrated(objective, pipeline.unet, eligible_weights(pipeline.unet))
    for name, at in edit.indices.items():
        signed = objective.sign * scores[name].flatten()
        lowest = signed[at].min()
        assert lowest > 0
        assert int((signed > lowest).sum()) < len(at)


WRONG = {
    "scores": ((*ERASE, "--scores", "second"), "expected taylor, integrated"),
    "a word": ((*ERASE, "--preserve", "a photo of tree"), "no `tree`"),
    "eligible": ((*ERASE, "--eligible", "conv"), "expected ff, attention, all"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, text = WRONG[wrong]
    before = torch.random.get_rng_state()
    assert run(*args, "--out", tmp_path / "out") == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert torch.equal(before, torch.random.get_rng_state())
