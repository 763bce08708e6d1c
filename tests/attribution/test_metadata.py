"""What images of A1111 and ComfyUI say, and what nobody should believe."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tolerances import EXACT

from lora_ws.attribution.metadata import (
    adapter_files,
    parse_parameters,
    parse_workflow,
    read_metadata,
)
from lora_ws.errors import DataError

A1111 = (
    "portrait of a cat, <lora:ink style:0.8>, night <lora:dots:-1>\n"
    "Negative prompt: blurry, <b>\n"
    "Steps: 25, Sampler: Euler a, CFG scale: 6.5, Seed: 1234567890, Size: 512x512, Model hash: 1a2b"
)
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 42,
            "steps": 20,
            "cfg": 8.0,
            "model": ["10", 0],
            "positive": ["9", 0],
            "negative": ["7", 0],
        },
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["10", 1]}},
    "9": {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["6", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "ink.safetensors", "strength_model": 0.7, "strength_clip": 1},
    },
}


def picture(file: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (4, 4)).save(file, pnginfo=info)
    return file


def test_a_picture_of_a1111(tmp_path: Path) -> None:
    said = read_metadata(picture(tmp_path / "a.png", parameters=A1111))
    assert said.prompt == "portrait of a cat, , night"
    assert said.negative_prompt == "blurry, <b>"
    assert said.adapters == {"ink style": 0.8, "dots": -1.0}
    assert (said.seed, said.num_inference_steps, said.guidance_scale) == (1234567890, 25, 6.5)


def test_a_picture_of_comfyui(tmp_path: Path) -> None:
    said = read_metadata(picture(tmp_path / "a.png", prompt=json.dumps(COMFY)))
    assert (said.prompt, said.negative_prompt) == ("a cat", "blurry")
    assert said.adapters == {"ink": 0.7}
    assert (said.seed, said.num_inference_steps, said.guidance_scale) == (42, 20, 8.0)


def test_what_is_not_said_is_none() -> None:
    said = parse_parameters("a cat <lora:ink>")
    assert (said.prompt, said.adapters) == ("a cat", {"ink": 1.0})
    assert (said.seed, said.num_inference_steps, said.guidance_scale) == (None, None, None)


@pytest.mark.parametrize("name", ["../ink", "/etc/ink", "a/../../ink", "..", "..\\ink", "a//ink"])
def test_a_name_that_is_a_path_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path.parent / "ink.safetensors").write_bytes(b"")
    said = parse_parameters(f"a cat <lora:{name}:1>")
    with pytest.raises(DataError, match="is a path"):
        adapter_files(said, tmp_path)


def test_names_are_found_in_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    said = parse_parameters("<lora:ink:1>")
    with pytest.raises(DataError, match=r"expected `ink\.safetensors`"):
        adapter_files(said, tmp_path)
    (tmp_path / "ink.safetensors").write_bytes(b"")
    assert adapter_files(said, tmp_path) == [tmp_path / "ink.safetensors"]


def test_what_says_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it says nothing; give --prompt"):
        read_metadata(picture(tmp_path / "a.png"))
    (tmp_path / "b.png").write_text("no image", encoding="utf-8")
    with pytest.raises(DataError, match="expected an image"):
        read_metadata(tmp_path / "b.png")
    with pytest.raises(DataError, match="KSampler"):
        read_metadata(picture(tmp_path / "c.png", prompt="[1, 2]"))


@pytest.mark.parametrize("name", ["ink", "style/ink", "style\\ink", "elsewhere/ink"])
def test_a_name_with_folders_is_found_inside_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "ink.safetensors").write_bytes(b"")
    said = parse_parameters(f"a cat <lora:{name}:1>")
    assert adapter_files(said, tmp_path) == [tmp_path / "style" / "ink.safetensors"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ink.safetensors").write_bytes(b"")
    if name.startswith("style"):
        assert adapter_files(said, tmp_path) == [tmp_path / "style" / "ink.safetensors"]
    else:
        with pytest.raises(DataError, match="give --adapters"):
            adapter_files(said, tmp_path)


TAGS = {
    "<lora:ink>": ("ink", 1.0, 1.0),
    "<lora:ink:0.5:0.9>": ("ink", 0.9, 0.5),
    "<lora:ink:0.5:.9:8>": ("ink", 0.9, 0.5),
    "<lora:ink:0:1>": ("ink", 1.0, 0.0),
    "<lora:ink:unet=0.7>": ("ink", 0.7, 1.0),
    "<lora:ink:te=0.3>": ("ink", 0.3, 0.3),
    "<lora:ink:te=0.3:unet=-.7>": ("ink", -0.7, 0.3),
    "<lora:ink:0.8:lbw=MIDD:stop=10>": ("ink", 0.8, 0.8),
    "<lora:ink:.8>": ("ink", 0.8, 0.8),
    "<lora:ink:1.>": ("ink", 1.0, 1.0),
    "<lora:ink: +1e-1 >": ("ink", 0.1, 0.1),
    "<lora:ink:-0.5>": ("ink", -0.5, -0.5),
    "<lora:my ink_v1.11.0:0.6>": ("my ink_v1.11.0", 0.6, 0.6),
    "<lora:[XL] ink (old):1>": ("[XL] ink (old)", 1.0, 1.0),
    "<lora:style\\ink:0.4>": ("style/ink", 0.4, 0.4),
    "<lyco:ink:0.4>": ("ink", 0.4, 0.4),
}


@pytest.mark.parametrize("tag", TAGS)
def test_tags_have_scales_of_unet_and_text_encoder(tag: str) -> None:
    said = parse_parameters(f"a cat, {tag}, photo\nSteps: 20, Seed: 5")
    name, unet, text = TAGS[tag]
    assert said.adapters == pytest.approx({name: unet}, rel=EXACT)
    assert said.text_scales == ({} if text == unet else {name: text})
    assert said.prompt == "a cat, , photo"


@pytest.mark.parametrize("argument", ["x", "", "0,8", "0.8@0.5", "nan", "1e999", "MIDD", "unet=x"])
def test_an_argument_that_cannot_be_read_is_an_error(argument: str) -> None:
    with pytest.raises(DataError, match=r"`<lora:ink:.*>`"):
        parse_parameters(f"a cat <lora:ink:{argument}>")


def test_tags_that_are_no_adapters() -> None:
    with pytest.raises(DataError, match="hypernetwork"):
        parse_parameters("a cat <hypernet:ink:0.8>")
    assert "tag <wild:ink>" in parse_parameters("a cat <wild:ink>").other_settings
    twice = parse_parameters("<lora:ink:0.5:1> <lora:ink:0.25>")
    assert (twice.adapters, twice.text_scales) == ({"ink": 1.25}, {"ink": 0.75})


WORDS = {
    "a (red:1.2) cat": "a red cat",
    "((big)) [small] cat": "big small cat",
    "a (very (red:1.3) cat:0.9)": "a very red cat",
    r"miku \(vocaloid\)": "miku (vocaloid)",
    "a cat :) (": "a cat :) (",
    "at 10:30 (noon)": "at 10:30 noon",
}


@pytest.mark.parametrize("prompt", WORDS)
def test_weights_of_words_leave_the_words(prompt: str) -> None:
    said = parse_parameters(prompt)
    assert said.prompt == WORDS[prompt]
    weighted = WORDS[prompt] not in (prompt, "miku (vocaloid)")
    assert ("weights of words" in said.other_settings) == weighted


@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5]", "[cat|dog]", "a cat AND a dog", "a BREAK b"])
def test_prompts_that_are_more_than_words_are_named(prompt: str) -> None:
    assert set(parse_parameters(prompt).other_settings) - {"weights of words"}
    assert not parse_parameters(
        "a [cat], (red:1.2), 10:30 BREAKFAST AND".lower()
    ).other_settings.keys() - {"weights of words"}


def test_settings_that_change_the_picture_are_named() -> None:
    text = (
        "a cat <lora:ink:0.5:0.9>\nNegative prompt: bad\nSteps: 20, Sampler: Euler a, "
        "CFG scale: 7, Seed: 5, Size: 512x768, Model: x, Clip skip: 2, Denoising strength: 0.5, "
        "Hires upscale: 2, "
        'Lora hashes: "ink: 1a, dots: 2b", Version: v1.9'
    )
    assert dict(parse_parameters(text).other_settings) == {
        "Sampler": "Euler a",
        "Size": "512x768",
        "Clip skip": "2",
        "Denoising strength": "0.5",
        "Hires upscale": "2",
    }


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_exif_of_other_files(ending: str, order: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0131] = "a program"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode(order)
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{ending}", exif=exif)
    said = read_metadata(tmp_path / f"a.{ending}")
    assert said == parse_parameters(A1111)


@pytest.mark.parametrize("charset", [b"ASCII\0\0\0", b"\0" * 8, b""])
def test_exif_of_one_byte_a_letter(charset: bytes, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = charset + A1111.encode()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_metadata(tmp_path / "a.jpg") == parse_parameters(A1111)


def test_exif_of_comfyui(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(COMFY)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    assert read_metadata(tmp_path / "a.webp").adapters == {"ink": 0.7}


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(DataError):
        said = parse_parameters(text)
        assert all(isinstance(scale, float) for scale in said.adapters.values())


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
inputs = st.dictionaries(
    st.sampled_from(
        ["seed", "steps", "cfg", "positive", "negative", "text", "lora_name", "model", "lora_1"]
    ),
    values,
)
nodes = st.fixed_dictionaries(
    {"class_type": st.sampled_from(["KSampler", "LoraLoader", "CLIPTextEncode"]), "inputs": inputs}
)


@given(st.dictionaries(st.sampled_from("123"), nodes | values))
def test_any_graph_is_parsed_or_refused(graph: dict) -> None:
    with contextlib.suppress(DataError):
        said = parse_workflow(json.dumps(graph), "a.png")
        assert all(isinstance(scale, float) for scale in said.adapters.values())
