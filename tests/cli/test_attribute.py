"""`attribute` as users meet it."""

import re
from pathlib import Path

import pytest
import torch
from browser import open_page
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from tolerances import EXACT, of_images

from lora_ws.adapters import read_adapter
from lora_ws.attribution.run import run as attributed
from lora_ws.attribution.spec import AttributeSpec
from lora_ws.cli import main
from lora_ws.diffusion.bank import AdapterBank
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.pipeline import adapter_layout, generate, load_pipeline


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    layout = adapter_layout(load_pipeline("digit-sd").unet, 2)
    (tmp_path / "loras").mkdir()
    for seed, name in enumerate(("ink", "dots")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"unet.{layer.name}.lora_{role}.weight": 0.3 * torch.randn(shape, generator=generator)
            for layer in layout.layers
            for role, shape in (("A", layer.down_shape), ("B", layer.up_shape))
        }
        save_file(tensors, tmp_path / "loras" / f"{name}.safetensors")
    return tmp_path / "loras"


def run(*args: object) -> int:
    return main(["attribute", "--base", "digit-sd", *map(str, args)])


@pytest.mark.slow
def test_boxes_have_shares_of_the_adapters(
    loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (loras / "ink.safetensors", loras / "dots.safetensors")
    drawn = ("--prompt", "three", "--num_inference_steps", 8, "--scales", 1, 0)
    args = ("--boxes", "[[0,0,8,8],[8,8,16,16]]", "--out", tmp_path / "out")
    assert run("--adapters", *files, *drawn, *args) == 0
    shown = capsys.readouterr().out.split("Effect")[1]
    # What is off did nothing anywhere.
    assert (
        re.findall(r"\(\d+, \d+, \d+, \d+\).*?([\d.]+) %.*?([\d.]+) %", shown)
        == [("100.0", "0.0")] * 2
    )
    assert "<h2" in (tmp_path / "out" / "attribution.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_page_shows_shares_and_maps(
    loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (loras / "ink.safetensors", loras / "dots.safetensors")
    drawn = ("--prompt", "a photo of three", "--num_inference_steps", 5, "--scales", 1, 0.2)
    assert run("--adapters", *files, *drawn, "--shapley", "true", "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"([\d.]+) %", shown)]
    # Each is printed with one digit.
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares) + EXACT)
    assert shares[0] > shares[1]
    page = tmp_path / "out" / "attribution.html"
    dom, probe = open_page(page, tmp_path)
    assert (probe["images"], probe["shown"], probe["fetched"]) == (3 + 2, 3 + 2, [])
    assert "from 4 images" in dom


@pytest.mark.slow
@pytest.mark.filterwarnings("default::lora_ws.errors.Notice")
def test_a_picture_says_what_it_was_made_of(
    loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    text = (
        "a photo of three <lora:ink:0.8> <lora:dots:0.4>\nSteps: 5, Sampler: Restart, Seed: 3, "
        "CFG scale: 2, Size: 16x16, Clip skip: 2"
    )
    info.add_text("parameters", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    picture = ("--from_image", tmp_path / "a.png", "--lora_dir", loras)
    assert run(*picture, "--out", tmp_path / "one") == 0
    told, warned = capsys.readouterr()
    lines = [line for line in warned.splitlines() if "not reproduced" in line]
    assert [re.findall(r"from_image: (.+) is not", line) for line in lines] == [
        ["Sampler (Restart)"],
        ["Clip skip (2)"],
    ]
    assert "a.png is 4x4 and says Size: 16x16; all of it is resized and compared" in warned
    assert "Given image, and generated again: mean absolute difference" in told
    page = (tmp_path / "one" / "attribution.html").read_text(encoding="utf-8")
    assert "Given image" in page
    assert "Restart" in page
    assert (tmp_path / "one" / "given.png").is_file()
    files = (loras / "ink.safetensors", loras / "dots.safetensors")
    drawn = (
        "--prompt",
        "a photo of three",
        "--num_inference_steps",
        5,
        "--seed",
        3,
        "--guidance_scale",
        2,
    )
    more = ("--scales", 0.8, 0.4, "--out", tmp_path / "two")
    assert run("--adapters", *files, *drawn, *more) == 0
    assert told.split("Effect")[0] == capsys.readouterr().out.split("Effect")[0]


@pytest.mark.parametrize(("tag", "text", "unet"), [("0.5:0.9", 0.5, 0.9), ("0:1", 0.0, 1.0)])
def test_a_tag_of_two_scales_is_drawn_with_both(
    tag: str, text: float, unet: float, loras: Path, tmp_path: Path
) -> None:
    file = loras / "ink.safetensors"
    tensors, name = load_file(file), "encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(5)
    parts = {
        role: torch.randn(shape, generator=generator)
        for role, shape in (("A", (2, 48)), ("B", (48, 2)))
    }
    stem = f"text_encoder.text_model.{name}.lora"
    save_file(tensors | {f"{stem}_{role}.weight": x for role, x in parts.items()}, file)
    info = PngInfo()
    info.add_text("parameters", f"three <lora:ink:{tag}>\nSteps: 2, Seed: 3, CFG scale: 1")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    drawn = attributed(
        AttributeSpec(base="digit-sd", from_image=tmp_path / "a.png", lora_dir=loras, shown=0)
    )
    assert drawn.left_out == {}
    pipeline = load_pipeline("digit-sd")
    encoder = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    encoder.get_submodule(name).weight += text * parts["B"] @ parts["A"]
    bank = AdapterBank.from_adapters([read_adapter(file)], ignore_other=True)
    generation = GenerationSpec("three", num_inference_steps=2, seed=3, guidance_scale=1)
    with bank.attach(pipeline.unet, [unet]):
        expected = generate(pipeline, generation)[0]
    torch.testing.assert_close(drawn.ablation.full, expected, rtol=0, atol=of_images(pipeline, 2))


WRONG = {
    "nothing": ((), "expected --adapters and --prompt"),
    "no folder": (("--from_image", "{picture}"), "lora_dir: expected the folder"),
    "no image": (("--from_image", "{loras}/ink.safetensors"), "expected an image"),
    "a word": (("--adapters", "{loras}/ink.safetensors", "--prompt", "tree"), "no `tree`"),
    "scales": (
        ("--adapters", "{loras}/ink.safetensors", "--prompt", "three", "--scales", "1", "2"),
        "scales: expected 1",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(
    wrong: str, loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    info.add_text("parameters", "three <lora:ink:1>")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    args, text = WRONG[wrong]
    filled = [arg.format(picture=tmp_path / "a.png", loras=loras) for arg in args]
    assert run(*filled, "--out", tmp_path / "out") == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
