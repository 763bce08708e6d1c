"""Bases read from folders, of whatever class, and from single files, without a network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_files import write_single_file
from tiny_pipelines import make
from tolerances import of_images

from lora_ws.diffusion.base_spec import PipelineSpec
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.loading import read_pipeline
from lora_ws.diffusion.pipeline import generate, load_base, load_pipeline
from lora_ws.errors import DataError, NotAvailableError

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digit-sd", "sd2", "sdxl", "sd3"])
def test_a_single_file_is_the_pipeline_that_it_was_written_from(kind: str, tmp_path: Path) -> None:
    made = load_pipeline(kind) if kind == "digit-sd" else make(kind)
    file = write_single_file(made, tmp_path / "model.safetensors")
    made.save_pretrained(tmp_path / "folder")
    for weights in (tmp_path / "folder").rglob("*.safetensors"):
        weights.unlink()
    spec = PipelineSpec(base=str(file), base_config=str(tmp_path / "folder"), device="cpu")
    read = load_base(spec)
    assert type(read) is type(made)
    for name in PARTS:
        if getattr(made, name, None) is None:
            continue
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (read, made))
        assert set(ours) == set(theirs), name
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name
    asked = GenerationSpec("cat", num_inference_steps=2)
    # What lies elsewhere in memory may be summed in another order.
    atol = of_images(made, asked.num_inference_steps, asked.guidance_scale)
    torch.testing.assert_close(generate(read, asked), generate(made, asked), atol=atol, rtol=0)


@pytest.mark.slow
def test_a_file_without_text_encoders_takes_them_from_its_configuration(tmp_path: Path) -> None:
    made, other = make("sd3"), make("sd3")
    other.save_pretrained(tmp_path / "folder")
    made.transformer.proj_out.weight.data += 1
    whole = load_file(write_single_file(made, tmp_path / "whole.safetensors"))
    file = tmp_path / "alone.safetensors"
    save_file({key: x for key, x in whole.items() if "text_encoders" not in key}, file)
    read = read_pipeline(str(file), str(tmp_path / "folder"))
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (read, made))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name


NO_BASES = {
    "refiner": ({"conditioner.embedders.0.model.ln_final.bias": (4,)}, "SDXL's refiner"),
    "inpainting": ({}, "9 channels"),
}


@pytest.mark.parametrize("what", NO_BASES)
def test_a_checkpoint_that_draws_no_images_from_noise_is_refused(what: str, tmp_path: Path) -> None:
    shapes, said = NO_BASES[what]
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3), **shapes}
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    with pytest.raises(DataError, match=said):
        read_pipeline(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux-schnell"])
def test_a_folder_says_its_own_class(kind: str, tmp_path: Path) -> None:
    made = make(kind)
    made.save_pretrained(tmp_path)
    read = read_pipeline(str(tmp_path))
    assert type(read) is type(made)
    component = "unet" if kind == "sdxl" else "transformer"
    ours, theirs = (getattr(pipe, component).state_dict() for pipe in (read, made))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_single_file_without_configuration_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(NotAvailableError, match=r"hf download black-forest-labs/FLUX\.1-dev"):
        read_pipeline(str(file))


def test_a_file_that_is_no_base_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1, 3)}, file)
    with pytest.raises(DataError, match="expected a checkpoint of Stable Diffusion, SDXL, SD3 or"):
        read_pipeline(str(file))
    with pytest.raises(NotAvailableError, match="no checkpoint that can be read"):
        read_pipeline(str(tmp_path / "missing.safetensors"))


def test_a_mistyped_base_is_answered_without_asking_the_hub() -> None:
    with pytest.raises(NotAvailableError, match="found none, did you mean `tiny-sd`"):
        read_pipeline("tinysd")


@pytest.mark.slow
def test_a_file_of_the_transformer_alone_takes_the_rest_from_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the file is diffusers' part, and done for the sizes that are published alone."""
    made, other = make("flux-dev"), make("flux-dev")
    made.save_pretrained(tmp_path / "folder")
    other.transformer.proj_out.weight.data += 1
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}, file)

    def read(name: str, config: str, subfolder: str, torch_dtype: torch.dtype) -> Any:
        assert (name, config, subfolder) == (str(file), str(tmp_path / "folder"), "transformer")
        return other.transformer

    monkeypatch.setattr("diffusers.FluxTransformer2DModel.from_single_file", read)
    pipeline = read_pipeline(str(file), str(tmp_path / "folder"))
    assert pipeline.transformer is other.transformer
    ours, theirs = (pipe.text_encoder_2.state_dict() for pipe in (pipeline, made))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
