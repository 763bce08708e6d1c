"""What pictures of A1111 and ComfyUI say, and what nobody should believe."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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
        "inputs": {"seed": 42, "steps": 20, "cfg": 8.0, "positive": ["9", 0], "negative": ["7", 0]},
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


@pytest.mark.parametrize("name", ["../ink", "/etc/ink", "a/b", "..", "a\\b"])
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
    (tmp_path / "b.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(DataError, match="expected a picture"):
        read_metadata(tmp_path / "b.png")
    with pytest.raises(DataError, match="KSampler"):
        read_metadata(picture(tmp_path / "c.png", prompt="[1, 2]"))


@given(st.text())
def test_any_text_is_parsed(text: str) -> None:
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
    st.sampled_from(["seed", "steps", "cfg", "positive", "negative", "text", "lora_name"]), values
)
nodes = st.fixed_dictionaries(
    {"class_type": st.sampled_from(["KSampler", "LoraLoader", "CLIPTextEncode"]), "inputs": inputs}
)


@given(st.dictionaries(st.sampled_from("123"), nodes | values))
def test_any_graph_is_parsed_or_refused(graph: dict) -> None:
    with contextlib.suppress(DataError):
        said = parse_workflow(json.dumps(graph), "a.png")
        assert all(isinstance(scale, float) for scale in said.adapters.values())
