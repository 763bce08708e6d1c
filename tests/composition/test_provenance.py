"""What images say of themselves, read back by the readers of A1111's and ComfyUI's images."""

import json
from dataclasses import replace
from importlib.resources import files
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_ws.adapters.source import tensor_sha256
from lora_ws.attribution.metadata import parse_parameters, parse_workflow, read_metadata
from lora_ws.diffusion import AdapterStack
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.provenance import Provenance, used_adapters
from lora_ws.diffusion.samplers import SAMPLERS, sampler_of, scheduler_called
from lora_ws.report.images import to_png

TESTBED = Path(str(files("lora_ws") / "_assets/digit_testbed"))
PROMPTS = ("a photo of three", r"a (big) [red] cat, at: \night \(ink\)", "Größe: ☃, 猫")


@pytest.fixture(scope="module")
def made() -> Provenance:
    stack = AdapterStack.of(
        [TESTBED / "sun.safetensors", TESTBED / "ball.safetensors"], [0.8, -1.25]
    )
    generation = GenerationSpec(PROMPTS[0], guidance_scale=2.5, num_inference_steps=7)
    return Provenance(
        base="digit-sd",
        scheduler="DDIMScheduler",
        generation=generation,
        seeds=(5, 2**64 - 1),
        size=(16, 24),
        adapters=used_adapters(stack),
    )


@pytest.mark.parametrize(("prompt", "negative"), [*product(PROMPTS, ("", PROMPTS[1]))])
def test_what_is_written_is_read_again(prompt: str, negative: str, made: Provenance) -> None:
    made = replace(
        made, generation=replace(made.generation, prompt=prompt, negative_prompt=negative)
    )
    for seed in made.seeds:
        texts = made.texts(seed)
        for said in (parse_parameters(texts["parameters"]), parse_workflow(texts["prompt"], "it")):
            assert (said.prompt, said.negative_prompt, said.seed) == (prompt, negative, seed)
            assert said.adapters == {"sun": 0.8, "ball": -1.25}
            assert (said.num_inference_steps, said.guidance_scale) == (7, 2.5)
            assert said.other_settings["Size"] == "16x24"
            named = said.other_settings.get("Sampler") or said.other_settings["sampler_name"]
            assert scheduler_called(named) == "DDIMScheduler"


def test_a_png_holds_it(made: Provenance, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(to_png(torch.zeros(3, 4, 4), made.texts(5)))
    assert read_metadata(file).adapters == {"sun": 0.8, "ball": -1.25}
    with Image.open(file) as image:
        assert json.loads(image.info["prompt"])["5"]["class_type"] == "KSampler"
        own = tensor_sha256(TESTBED / "sun.safetensors")[:12]
        assert f"sun: {own}" in image.info["parameters"]


def test_other_methods_are_no_graph_of_comfy(made: Provenance) -> None:
    texts = replace(made, method="Switch(tau=2)").texts(5)
    assert list(texts) == ["parameters"]
    said = parse_parameters(texts["parameters"])
    assert said.other_settings["Composition"].strip('"') == "Switch(tau=2)"


def test_scales_of_text_encoders_are_the_first_number(made: Provenance) -> None:
    sun, ball = made.adapters
    made = replace(made, adapters=(sun._replace(text_scale=0.0), ball))
    said = parse_parameters(made.parameters(5))
    assert said.adapters == {"sun": 0.8, "ball": -1.25}
    assert said.text_scales == {"sun": 0.0}


def test_names_of_samplers_are_one_to_one() -> None:
    import diffusers

    for sampler in SAMPLERS:
        assert hasattr(diffusers, sampler.scheduler)
        assert sampler_of(sampler.scheduler) == sampler
        for name in filter(None, sampler):
            assert scheduler_called(name) == sampler.scheduler
    assert sampler_of("TCDScheduler").a1111 == "TCD"
    assert scheduler_called("") is None
