"""`concepts erase` and `amplify` as users meet them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import open_page
from tolerances import of_images, rounding

from lora_ws.cli import main
from lora_ws.concepts.apply import edit_adapter
from lora_ws.concepts.edit import SparseEdit, choose
from lora_ws.concepts.objective import (
    amplify_objective,
    eligible_weights,
    erase_objective,
)
from lora_ws.concepts.scores import contributions, integrated
from lora_ws.diffusion import compose
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
        pytest.param(
            (*ERASE, "--preserve", "a photo of six", "--neighbours", "a photo of two"),
            0.02,
            marks=pytest.mark.slow,
        ),
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
        assert told["gradients"] == "one prediction, as published"
        changed = told["image_changes"]["erased"]
        assert list(changed) == ["a photo of one", "a photo of six", "a photo of two"]
        assert min(changed.values()) > 0
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


@pytest.mark.slow
def test_scores_may_be_first_order(tmp_path: Path) -> None:
    """An edit by first-order scores, whose random edits they predict."""
    assert run(*ERASE, "--stop_gradient", "false", "--out", tmp_path) == 0
    told = json.loads((tmp_path / "edit.json").read_text(encoding="utf-8"))
    assert told["gradients"] == "both predictions"
    pipeline, prompt = load_pipeline("digit-sd"), "a photo of one"
    objective = erase_objective(pipeline, prompt, seeds=[0], steps=6, stop_gradient=False)
    weights = eligible_weights(pipeline.unet)
    edit = choose(contributions(objective, pipeline.unet, weights), weights, 0.05)
    kept = SparseEdit.load(tmp_path / "edit.safetensors")
    assert kept.changed == edit.changed
    assert all(torch.equal(kept.indices[name], at) for name, at in edit.indices.items())
    assert told["validity"]["correlation"] > 0.9


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


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the largest weights of digit-sd."""
    unet = load_pipeline("digit-sd").unet
    weights = eligible_weights(unet)
    chosen = choose({name: w.detach().abs() for name, w in weights.items()}, weights, 0.02)
    return chosen.save(tmp_path_factory.mktemp("edit") / "edit.safetensors")


def drawn(pipeline: Any) -> torch.Tensor:
    return generate(pipeline, GenerationSpec("a photo of one", num_inference_steps=2), images=1)


def edited(edit: Path) -> Any:
    pipeline = load_pipeline("digit-sd")
    SparseEdit.load(edit).apply(pipeline.unet)
    return pipeline


@pytest.mark.slow
def test_an_edit_is_written_as_a_pipeline(edit: Path, tmp_path: Path) -> None:
    assert run("apply", edit, "--base", "digit-sd", "--out", tmp_path / "sd") == 0
    loaded, expected = load_pipeline(str(tmp_path / "sd")), edited(edit)
    for name, weight in expected.unet.named_parameters():
        assert torch.equal(loaded.unet.get_parameter(name), weight)
    assert torch.equal(drawn(loaded), drawn(expected))


@pytest.mark.parametrize("rank", [None, 1, pytest.param(8, marks=pytest.mark.slow)])
def test_an_edit_is_an_adapter(rank: int | None, edit: Path) -> None:
    kept, pipeline = SparseEdit.load(edit), load_pipeline("digit-sd")
    made, plain = edit_adapter(kept, pipeline, rank), pipeline.unet
    lost = whole = 0.0
    with kept.applied(plain):
        after = {n: plain.get_parameter(n).detach().clone().double() for n in kept.indices}
    for name, module in made.adapter.modules.items():
        before = plain.get_parameter(f"{name}.weight").detach().double()
        update = torch.from_numpy(module.up.astype(float) @ module.down)
        error, wanted = after[f"{name}.weight"] - before - update, after[f"{name}.weight"] - before
        lost, whole = lost + float(error.square().sum()), whole + float(wanted.square().sum())
        assert module.rank == (min(wanted.shape) if rank is None else rank)
        # Eckart and Young: no product of the rank is nearer.
        values = torch.linalg.svdvals(wanted)[module.rank :]
        size = float(wanted.norm())
        assert float(error.norm()) <= float(values.norm()) + rounding(module.rank, size=size)
    assert made.energy == pytest.approx(1 - lost / whole, abs=rounding(len(after)))
    assert (made.energy == 1) == (rank is None)


@pytest.mark.slow
def test_an_adapter_of_an_edit_draws_what_the_edit_draws(edit: Path, tmp_path: Path) -> None:
    args = ("--base", "digit-sd", "--to", "adapter", "--out", tmp_path / "lora")
    assert run("apply", edit, *args) == 0
    pipeline = load_pipeline("digit-sd")
    plain = drawn(pipeline)
    with compose(pipeline, [tmp_path / "lora" / "edit.safetensors"]):
        own = drawn(pipeline)
    wanted = drawn(edited(edit))
    near = of_images(pipeline, 2, GenerationSpec("").guidance_scale)
    assert float((own - wanted).abs().max()) <= near < float((plain - wanted).abs().max())


APPLY = {
    "another base": (("--base", "tiny-sd"), "expected the weights that the edit was made for"),
    "no folder of its own": (("--base", "digit-sd", "--out", "{edit}"), "is not empty"),
    "rank": (("--base", "digit-sd", "--rank", 4), "expected --to adapter"),
}


@pytest.mark.parametrize(
    "wrong",
    [pytest.param(w, marks=pytest.mark.slow if "base" in w else ()) for w in APPLY],
)
def test_what_cannot_be_applied_is_named(
    wrong: str, edit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, text = APPLY[wrong]
    given = [str(arg).format(edit=edit.parent) for arg in args]
    assert run("apply", edit, "--out", tmp_path / "out", *given) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
