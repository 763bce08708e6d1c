"""What is drawn, as data: one prompt for all images, or one per image."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import of_images

from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.methods import Composite, Merge, Regions, Switch
from lora_ws.diffusion.pipeline import (
    decode_latents,
    denoise,
    generate,
    initial_noise,
    load_pipeline,
)
from lora_ws.errors import ConfigError


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("digit-sd")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_generate_and_denoise_draw_what_the_pipeline_draws(
    guidance_scale: float, pipeline: Any
) -> None:
    prompts = ("a photo of three", "a photo of seven")
    generation = GenerationSpec(
        prompts,
        negative_prompt="a photo of one",
        guidance_scale=guidance_scale,
        num_inference_steps=2,
        seed=4,
    )
    noise = initial_noise(pipeline, [4, 5])
    theirs = pipeline(
        list(prompts),
        negative_prompt=["a photo of one"] * 2,
        guidance_scale=guidance_scale,
        num_inference_steps=2,
        latents=noise,
        output_type="pt",
    ).images
    assert torch.equal(generate(pipeline, generation), theirs * 2 - 1)
    assert torch.equal(generate(pipeline, generation, seeds=[4, 5]), theirs * 2 - 1)
    *_, latents = denoise(pipeline, noise, generation)
    atol = of_images(pipeline, 2, guidance_scale)
    assert torch.allclose(decode_latents(pipeline, latents), theirs * 2 - 1, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_starts_from_the_same_noise(dtype: Any, pipeline: Any) -> None:
    half = load_pipeline("digit-sd", dtype=dtype)
    assert {p.dtype for p in half.unet.parameters()} == {getattr(torch, dtype)}
    generation = GenerationSpec("a photo of three", guidance_scale=1, num_inference_steps=1, seed=4)
    own, other = (generate(p, generation) for p in (half, pipeline))
    assert own.dtype == torch.float32
    eps = torch.finfo(getattr(torch, dtype)).eps / torch.finfo(torch.float32).eps
    near = float((own - other).abs().mean())
    assert near < of_images(pipeline, 1) * eps
    elsewhere = generate(pipeline, replace(generation, seed=5))
    assert near < 0.2 * float((elsewhere - other).abs().mean())


def test_a_device_that_is_not_here_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is here")
    with pytest.raises(ConfigError, match="device: there is no cuda here; expected auto or"):
        load_pipeline("digit-sd", "cuda")


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "two of three": (lambda: GenerationSpec(("a", "b")).prompts(3), "prompt: expected 1 or 3"),
    "none": (lambda: GenerationSpec(()), "prompt: expected at least one"),
    "steps": (lambda: GenerationSpec("a", num_inference_steps=0), "num_inference_steps: expected"),
    "weights": (lambda: Merge().weighed((1.0,)), "expected a method such as Switch or Composite"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_named(wrong: str) -> None:
    call, text = WRONG[wrong]
    with pytest.raises(ConfigError, match=text):
        call()


def test_a_method_is_called_by_its_class_and_the_options_that_differ() -> None:
    methods = (Merge(normalised=True), Switch(tau=10), Switch(5), Regions(torch.ones(1, 2, 2)))
    assert list(map(str, methods)) == [
        "Merge(normalised=True)",
        "Switch(tau=10)",
        "Switch",
        "Regions",
    ]
    assert Composite().weighed((1.0, 3.0)) == Composite(weights=(1.0, 3.0))
