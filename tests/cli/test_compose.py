"""`compose` as users meet it."""

import re
from pathlib import Path

import pytest
import torch
from browser import open_page
from PIL import Image
from safetensors.torch import save_file

from lora_ws.adapters import read_adapter
from lora_ws.cli import main
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    layout = adapter_layout(load_pipeline("digit-sd").unet, 2)
    names = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"unet.{layer.name}.lora_{role}.weight": 0.3 * torch.randn(shape, generator=generator)
            for layer in layout.layers
            for role, shape in (("A", layer.down_shape), ("B", layer.up_shape))
        }
        names.append(str(tmp_path / f"concept{seed}.safetensors"))
        save_file(tensors, names[-1])
    return names


def run(files: list[str], *more: object, prompt: str = "a photo of three") -> int:
    args = ["--base", "digit-sd", "--adapters", *files, "--prompt", prompt, "--steps", "8"]
    return main(["compose", *args, "--images", "2", *map(str, more)])


@pytest.mark.parametrize("method", ["merge", "merge-normalised", "switch", "composite"])
def test_the_grid_has_a_row_for_none_each_and_all(
    method: str, files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "grid.png"
    assert run(files, "--method", method, "--scales", 1, 0.5, 0.8, "--out", out) == 0
    with Image.open(out) as picture:
        # 16 pixels sixfold, two columns, five rows, and room for the labels.
        assert picture.size == (220 + 2 * 96, 5 * 96)
        tiles = [picture.crop((220, k * 96, 316, k * 96 + 96)).tobytes() for k in range(5)]
    assert len(set(tiles)) == 5


def test_a_page_shows_pictures_steps_and_sizes(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    assert run(files, "--scales", 1, 0.5, 0.1, "--out", out) == 0
    dom, probe = open_page(tmp_path / "grid.html", tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (2, 2, [])
    assert "after steps 1, 2, 3, 4, 5, 6, 7, 8" in dom
    assert re.search(r"The largest update is [\d.]+ times the smallest", dom)
    assert dom.count("concept2: ") == 6, "five blocks, and all of them"
    with Image.open(tmp_path / "grid-steps.png") as strip:
        assert strip.size == (8 * 96, 96)


def test_turns_have_the_length_asked_for(files: list[str], tmp_path: Path) -> None:
    args = ("--method", "switch", "--out")
    assert run(files, *args, tmp_path / "5.png") == 0
    assert run(files, *args, tmp_path / "as 5.png", "--tau", 5) == 0
    assert run(files, *args, tmp_path / "1.png", "--tau", 1) == 0
    five, again, one = ((tmp_path / f"{n}.png").read_bytes() for n in ("5", "as 5", "1"))
    assert five == again != one


def test_prompts_weigh_turns(files: list[str], tmp_path: Path) -> None:
    plain, weighed = tmp_path / "plain.png", tmp_path / "weighed.png"
    args = ("--method", "switch", "--out")
    assert run(files, *args, plain) == 0
    assert run(files, *args, weighed, "--triggers", "photo", "of", "three") == 0
    assert plain.read_bytes() != weighed.read_bytes()


def test_a_merge_is_written_as_one_adapter(files: list[str], tmp_path: Path) -> None:
    scales = (1, 0.5, 0.8)
    args = ("--scales", *scales, "--out", tmp_path / "g.png", "--export", tmp_path / "merged")
    assert run(files, *args) == 0
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    merged = read_adapter(file)
    read = [read_adapter(name) for name in files]
    for name, module in merged.modules.items():
        parts = zip(read, scales, strict=True)
        expected = sum(s * a.modules[name].up @ a.modules[name].down for a, s in parts)
        assert module.scale * module.up @ module.down == pytest.approx(expected, abs=1e-4)


WRONG = {
    "a long prompt": (("a photo of " + "three " * 20,), (), "at most 10 tokens"),
    "an unknown word": (("a photo of tree",), (), "no `tree`, did you mean `three`?"),
    "scales": (("three",), ("--scales", 1, 2), "scales: expected 3"),
    "a method": (("three",), ("--method", "swap"), "expected merge"),
    "no merge to write": (("three",), ("--method", "switch", "--export", "x"), "is no merge"),
    "triggers of a merge": (
        ("a photo of three",),
        ("--triggers", "a", "photo", "three"),
        "switch or composite",
    ),
    "turns of a merge": (("a photo of three",), ("--tau", 3), "merge has no turns"),
    "no turns": (("a photo of three",), ("--method", "switch", "--tau", 0), "at least 1 step"),
    "few triggers": (
        ("a photo of three",),
        ("--method", "switch", "--triggers", "three"),
        "triggers: expected 3",
    ),
    "a trigger that is not in the prompt": (
        ("a photo of three",),
        ("--method", "switch", "--triggers", "photo", "three", "seven"),
        "phrases of the prompt, got `seven`",
    ),
    "a base": (("three",), ("--base", "tiny-sd"), "is this their base"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named_before_anything_is_drawn(
    wrong: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompt,), args, text = WRONG[wrong]
    out = tmp_path / "grid.png"
    assert run(files, *args, "--out", out, prompt=prompt) == 2
    assert text in capsys.readouterr().err
    assert not out.exists()
