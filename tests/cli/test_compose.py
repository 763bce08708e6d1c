"""`compose` as users meet it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_page
from PIL import Image
from safetensors.torch import save_file
from tolerances import of_images, rounding

from lora_ws.adapters import read_adapter
from lora_ws.attribution.metadata import read_metadata
from lora_ws.cli import main
from lora_ws.composition.run import run as run_spec
from lora_ws.composition.spec import ComposeSpec
from lora_ws.config import load_spec
from lora_ws.diffusion import Regions, Switch
from lora_ws.diffusion.pipeline import adapter_layout, load_pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    layout = adapter_layout(load_pipeline("digit-sd").unet, 2)
    names = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"unet.{layer.name}.lora_{role}.weight": 0.3 * torch.randn(shape, generator=generator)
            for layer in layout.layers
            for role, shape in (("A", layer.down_shape), ("B", layer.up_shape))
        }
        names.append(str(folder / f"concept{seed}.safetensors"))
        save_file(tensors, names[-1])
    return names


def run(files: list[str], *more: object, prompt: str = "a photo of three", steps: int = 8) -> int:
    args = ["--base", "digit-sd", "--adapters", *files, "--prompt", prompt]
    args += ["--num_inference_steps", str(steps)]
    return main(["compose", *args, "--images", "2", *map(str, more)])


# What methods do is tested where they are; here, that flags reach them.
METHODS = {
    "Merge": (),
    "Merge, normalised": ("--method", "Merge", "--method.normalised", "true"),
    "Switch": ("--method", "Switch", "--method.tau", 2),
    "Composite": ("--method", "lora_ws.diffusion.Composite", "--method.weights", "[3,1,1]"),
    "AdaptiveSwitch": ("--method", "AdaptiveSwitch", "--method.turns", 2),
    "Schedule": ("--method", "Schedule", "--method.windows", "[[0,0.5],[0.5,1],[0,1]]"),
}


QUICK = ("Switch",)


@pytest.mark.parametrize(
    "method",
    [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in QUICK)],
)
def test_the_grid_has_a_row_for_none_each_and_all(
    method: str, files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "grid.png"
    assert run(files, *METHODS[method], "--scales", 1, 0.5, 0.8, "--out", out) == 0
    with Image.open(out) as picture:
        # 16 pixels sixfold, two columns, five rows, and room for the labels.
        assert picture.size == (220 + 2 * 96, 5 * 96)
        tiles = [picture.crop((220, k * 96, 316, k * 96 + 96)).tobytes() for k in range(5)]
    assert len(set(tiles)) == 5


@pytest.mark.slow
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


@pytest.mark.slow
def test_masks_are_pictures(files: list[str], tmp_path: Path) -> None:
    left = np.zeros((4, 4), np.uint8)
    left[:, :2] = 255
    for name, mask in (("left", left), ("right", 255 - left)):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    names = [str(tmp_path / f"{name}.png") for name in ("left", "right")]
    args = ("--method", "Regions", "--method.masks", json.dumps(names))
    assert run(files[:2], *args, "--out", tmp_path / "grid.png") == 0
    masks = torch.from_numpy(np.stack([left, 255 - left]) / 255).float()
    spec = ComposeSpec(
        base="digit-sd",
        adapters=files[:2],
        prompt="a photo of three",
        num_inference_steps=8,
        images=2,
        method=Regions(masks),
        out=tmp_path / "python.png",
    )
    drawn, page, *_ = run_spec(spec)
    assert drawn.read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert page == tmp_path / "python.html"


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text(
        """
base: digit-sd
adapters: [a.safetensors, b.safetensors]
prompt: a photo of three
negative_prompt: a photo of one
seed: 7
method: {class_path: Switch, init_args: {tau: 10, weights: [1, 3]}}
""",
        encoding="utf-8",
    )
    assert load_spec(ComposeSpec, tmp_path / "compose.yaml") == ComposeSpec(
        base="digit-sd",
        adapters=["a.safetensors", "b.safetensors"],
        prompt="a photo of three",
        negative_prompt="a photo of one",
        seed=7,
        method=Switch(tau=10, weights=(1.0, 3.0)),
    )


@pytest.mark.slow
def test_flags_of_before_are_taken_with_a_notice(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ("--tau", 3, "--method", "switch", "--negative", "a photo of one", "--guidance", 2)
    new = ("--method", "Switch", "--method.tau", 3, "--negative_prompt", "a photo of one")
    assert run(files[:2], *old, "--out", tmp_path / "old.png", steps=4) == 0
    assert len(capsys.readouterr().err.splitlines()) == 4
    new = (*new, "--guidance_scale", 2)
    assert run(files[:2], *new, "--out", tmp_path / "new.png", steps=4) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "old.png").read_bytes() == (tmp_path / "new.png").read_bytes()


@pytest.mark.filterwarnings("default::lora_ws.errors.Notice")
@pytest.mark.slow
def test_turns_have_the_length_asked_for(files: list[str], tmp_path: Path) -> None:
    args = ("--method", "Switch", "--out")
    assert run(files, *args, tmp_path / "5.png") == 0
    assert run(files, *args, tmp_path / "as 5.png", "--method.tau", 5) == 0
    assert run(files, *args, tmp_path / "1.png", "--method.tau", 1) == 0
    five, again, one = ((tmp_path / f"{n}.png").read_bytes() for n in ("5", "as 5", "1"))
    assert five == again != one


@pytest.mark.filterwarnings("default::lora_ws.errors.Notice")
@pytest.mark.slow
def test_prompts_weigh_turns(files: list[str], tmp_path: Path) -> None:
    plain, weighed = tmp_path / "plain.png", tmp_path / "weighed.png"
    args = ("--method", "Switch", "--out")
    assert run(files, *args, plain) == 0
    assert run(files, *args, weighed, "--triggers", "photo", "of", "three") == 0
    assert plain.read_bytes() != weighed.read_bytes()


@pytest.mark.slow
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
        atol = rounding(module.rank, size=float(np.abs(expected).max()))
        np.testing.assert_allclose(module.scale * module.up @ module.down, expected, atol=atol)


WRONG = {
    "a long prompt": (("a photo of " + "three " * 20,), (), "at most 10 tokens"),
    "an unknown word": (("a photo of tree",), (), "no `tree`, did you mean `three`?"),
    "scales": (("three",), ("--scales", 1, 2), "scales: expected 3"),
    "a method": (("three",), ("--method", "Swich"), "did you mean `Switch`"),
    "no merge to write": (("three",), ("--method", "Switch", "--export", "x"), "is no merge"),
    "triggers of a merge": (
        ("a photo of three",),
        ("--triggers", "a", "photo", "three"),
        "Switch or Composite",
    ),
    "turns of a merge": (
        ("a photo of three",),
        ("--method", "Merge", "--method.tau", 3),
        "unknown option `tau` of Merge",
    ),
    "no turns": (
        ("a photo of three",),
        ("--method", "Switch", "--method.tau", 0),
        "at least 1 step",
    ),
    "few triggers": (
        ("a photo of three",),
        ("--method", "Switch", "--triggers", "three"),
        "triggers: expected 3",
    ),
    "a trigger that is not in the prompt": (
        ("a photo of three",),
        ("--method", "Switch", "--triggers", "photo", "three", "seven"),
        "phrases of the prompt, got `seven`",
    ),
    "no mask": (
        ("three",),
        ("--method", "Regions", "--method.masks", '["nowhere.png"]'),
        "masks: expected an image, got `nowhere.png`",
    ),
    "few block weights": (("three",), ("--block_weights", "1"), "block_weights: expected 3"),
    "a base": (("three",), ("--base", "tiny-sd"), "made for unknown U-Net with a context of 48: `"),
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


@pytest.mark.filterwarnings("default::lora_ws.errors.Notice")
def test_images_stand_alone_and_say_what_they_were_made_by(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--width", 24, "--height", 16, "--scheduler", "EulerDiscreteScheduler")
    args = (
        "--method",
        "Switch",
        "--scales",
        1,
        0.5,
        "--seeds",
        9,
        3,
        *size,
        "--out",
        tmp_path / "g.png",
    )
    assert run(files[:2], *args, steps=4) == 0
    notices = [line for line in capsys.readouterr().err.splitlines() if "acts at none" in line]
    assert len(notices) == 1, "of turns of five steps in four the second adapter has none"
    assert "concept1" in notices[0]
    folder = tmp_path / "g-images"
    rows = ("none", "concept0", "concept1", "all")
    assert {file.name for file in folder.iterdir()} == {
        f"{r}-{s}.png" for r in rows for s in (9, 3)
    }
    with Image.open(folder / "all-3.png") as one, Image.open(folder / "concept0-3.png") as other:
        assert one.size == (24, 16)
        # Switch never gets to the second adapter.
        assert one.tobytes() == other.tobytes()
    said = read_metadata(folder / "concept1-9.png")
    assert (said.seed, said.adapters) == (9, {"concept1": 0.5})
    told = json.loads((tmp_path / "g.json").read_text(encoding="utf-8"))
    assert (told["seeds"], told["width"], told["height"]) == ([9, 3], 24, 16)
    assert told["scheduler"] == "EulerDiscreteScheduler"
    assert told["method"] == "Switch"
    assert [a["scale"] for a in told["adapters"]] == [1, 0.5]
    page = (tmp_path / "g.html").read_text(encoding="utf-8")
    assert all(adapter["sha256"] in page for adapter in told["adapters"])


@pytest.mark.filterwarnings("default::lora_ws.errors.Notice")
@pytest.mark.slow
def test_blocks_are_weighed_per_adapter(files: list[str], tmp_path: Path) -> None:
    every = [f"{way}{k:02}=0" for way in ("in", "out") for k in range(12)]
    none = ",".join([*every, "mid=0"])
    args = ("--block_weights", none, "1", "--out", tmp_path / "g.png")
    assert run(files[:2], *args, steps=2) == 0
    assert run(files[:2], "--scales", 0, 1, "--out", tmp_path / "h.png", steps=2) == 0
    one, other = (tmp_path / f"{name}-images" / "all-1.png" for name in ("g", "h"))
    with Image.open(one) as weighed, Image.open(other) as alone:
        assert weighed.tobytes() == alone.tobytes()
    said = read_metadata(one)
    assert said.other_settings["lbw of concept0"] == none
    assert said.adapters == {"concept0": 1, "concept1": 1}


@pytest.mark.slow
def test_an_image_is_attributed_by_what_it_says(files: list[str], tmp_path: Path) -> None:
    out = ("--scales", 1, 0.5, 0.8, "--seed", 11, "--out", tmp_path / "g.png")
    assert run(files, *out, "--scheduler", "EulerDiscreteScheduler", steps=6) == 0
    image = tmp_path / "g-images" / "all-12.png"
    folder = str(Path(files[0]).parent)
    given = ["--base", "digit-sd", "--from_image", str(image), "--lora_dir", folder]
    assert main(["attribute", *given, "--out", str(tmp_path / "why")]) == 0
    told = json.loads((tmp_path / "why" / "attribution.json").read_text(encoding="utf-8"))
    assert (told["seeds"], told["num_inference_steps"]) == ([12], 6)
    assert told["scheduler"] == "EulerDiscreteScheduler"
    assert {a["name"]: a["scale"] for a in told["adapters"]} == dict(
        zip(("concept0", "concept1", "concept2"), (1, 0.5, 0.8), strict=True)
    )
    assert told["left_out"] == {}
    # Eight bits of a channel are as near as a PNG is.
    assert told["distance"] <= 1 / 255 + of_images(load_pipeline("digit-sd"), 6, 3)


@pytest.mark.filterwarnings("default::lora_ws.errors.Notice")
@pytest.mark.slow
def test_a_file_twice_and_a_scale_of_0_are_said(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [files[0], files[0], files[1]]
    assert run(twice, "--scales", 1, 1, 0, "--out", tmp_path / "g.png", steps=1) == 0
    told = capsys.readouterr().err
    assert "concept0 2 is the same file as concept0 1" in told
    assert "concept1 has a scale of 0" in told
