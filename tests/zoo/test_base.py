from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tolerances import rounding, terms_of
from torch import nn
from warm import COMMAND, Warm

from lora_ws.adapters import Layout
from lora_ws.config import load_spec, spec_files, to_plain
from lora_ws.diffusion.pipeline import (
    adapter_layout,
    base_facts,
    build_pipeline,
    decode_latents,
    encode_images,
    load_pipeline,
)
from lora_ws.errors import ConfigError, DataError, NotAvailableError, TrainingError
from lora_ws.zoo.base import BaseSpec, train_base
from lora_ws.zoo.photos import Photos, PhotoSpec, load_photos
from lora_ws.zoo.quality import psnr

RECIPE = """\
size: {image_size: 16, vae_channels: [8, 8], unet_channels: [8, 8], unet_layers: 1,
       attention_levels: 2, heads: 2, text_width: 8, text_layers: 1, norm_groups: 4}
vae: {steps: 6, batch_size: 4, warmup: 2}
denoiser: {steps: 30, batch_size: 4, warmup: 2}
checkpoint_every: 5
grid_every: 1000
"""


def untrained_judge(photos: Photos, words: list[str], seed: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, len(words)))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_killed_training_comes_to_the_same_weights(
    recipe: Path, tmp_path: Path, warm_all: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("zoo", "base", "--config", recipe, "--out", tmp_path / "killed")
    warm_all.start(COMMAND, *args).kill((tmp_path / "killed.work" / "denoiser.pt").exists)
    assert not (tmp_path / "killed").exists()
    # How good they are is not at stake, and a trained judge takes more steps than they do.
    monkeypatch.setattr("lora_ws.zoo.quality.train_judge", untrained_judge)
    spec = load_spec(BaseSpec, recipe)
    for name in ("killed", "whole"):
        train_base(replace(spec, out=tmp_path / name))
    for part in ("unet", "vae"):
        one, other = (
            load_file(tmp_path / name / part / "diffusion_pytorch_model.safetensors")
            for name in ("killed", "whole")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
    facts = base_facts(str(tmp_path / "killed"))
    assert facts["quality"]["chance"] == 0.5
    assert (tmp_path / "killed.work" / "samples.png").exists()
    with pytest.raises(ConfigError, match="exists already"):
        train_base(replace(spec, out=tmp_path / "killed"))


def test_quality_is_not_measured_on_what_was_trained_on() -> None:
    for photos, held_out in ((PhotoSpec(source="a.parquet"), "test"), (PhotoSpec(), "train")):
        with pytest.raises(ConfigError, match="held_out"):
            BaseSpec(photos=photos, held_out=held_out)


def test_another_recipe_does_not_go_on(recipe: Path, tmp_path: Path) -> None:
    spec = load_spec(BaseSpec, recipe)
    (tmp_path / "x.work").mkdir()
    (tmp_path / "x.work" / "recipe.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="another recipe"):
        train_base(BaseSpec(**{**vars(spec), "out": tmp_path / "x"}))


def test_a_diverging_training_says_so(recipe: Path, tmp_path: Path) -> None:
    spec = load_spec(BaseSpec, recipe)
    wild = type(spec.vae)(**{**vars(spec.vae), "learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"vae\.learning_rate"):
        train_base(BaseSpec(**{**vars(spec), "out": tmp_path / "x", "vae": wild}))


@pytest.mark.parametrize("name", ["digit-sd", "tiny-sd"])
def test_bundled_bases(name: str) -> None:
    pipeline = load_pipeline(name)
    recipe = load_spec(BaseSpec, spec_files("training")[f"zoo/{name.replace('-', '_')}"])
    facts = base_facts(name)
    assert facts["recipe"]["denoiser"]["steps"] == recipe.denoiser.steps
    assert facts["recipe"]["vae"]["steps"] == recipe.vae.steps
    assert facts["recipe"]["size"].items() <= to_plain(recipe.size).items()
    assert facts["quality"]["recognised"] > 0.5 + 0.4 * (name == "digit-sd")
    assert facts["quality"]["psnr_db"] > 25
    assert pipeline.unet.dtype == torch.float32
    image = pipeline("a photo of even", num_inference_steps=2, output_type="pt").images
    assert image.shape[-1] == recipe.size.image_size


def test_tiny_sd_has_the_modules_of_stable_diffusion() -> None:
    layout = adapter_layout(load_pipeline("tiny-sd").unet)
    assert layout == Layout.known("tiny_sd_qv")
    assert [x.name for x in layout.layers] == [x.name for x in Layout.sd15_qv().layers]


def test_digit_sd_reconstructs_digits_it_never_saw() -> None:
    photos = load_photos(PhotoSpec(split="test"), 16)
    assert set(photos.hashes()).isdisjoint(base_facts("digit-sd")["photos"])
    real = photos.tensor()[::20]
    pipeline = load_pipeline("digit-sd")
    assert psnr(real, decode_latents(pipeline, encode_images(pipeline, real))) > 35


def test_an_unknown_base() -> None:
    with pytest.raises(NotAvailableError, match="digit-sd"):
        load_pipeline("/nowhere/at/all")


def test_photos_of_a_parquet(tmp_path: Path) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (255, 0, 0)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    file = tmp_path / "photos.parquet"
    table = {"image": [image] * 2, "category_label": ["cat", "dog"], "category_name": ["x", "y"]}
    pq.write_table(pa.table(table), file)
    words = {"cats": "cat", "dogs": "dog"}
    photos = load_photos(PhotoSpec(source=str(file), image="img", words=words), 8)
    assert photos.categories == ("cat", "dog")
    assert (photos.pixels == [255, 0, 0]).all()
    only = load_photos(PhotoSpec(source=str(file), words={"cat": "feline"}), 8)
    assert only.categories == ("feline",)
    with pytest.raises(DataError, match="has no class `cow`"):
        load_photos(PhotoSpec(source=str(file), words={"cow": "cow"}), 8)
    pq.write_table(pa.table({"image": [image]}), file)
    with pytest.raises(DataError, match="expected columns"):
        load_photos(PhotoSpec(source=str(file)), 8)
    pq.write_table(pa.table(table), tmp_path / "test.parquet")
    assert len(load_photos(PhotoSpec(source=str(tmp_path), split="test"), 8)) == 2
    with pytest.raises(NotAvailableError, match=r"no file .*train\.parquet"):
        load_photos(PhotoSpec(source=str(tmp_path)), 8)
    with pytest.raises(NotAvailableError, match="no file"):
        load_photos(PhotoSpec(source=str(tmp_path / "none.parquet")), 8)


def test_records_show_no_folder_of_this_machine() -> None:
    assert PhotoSpec(source="photos/of/me/a.parquet").public.source == "a.parquet"
    assert PhotoSpec(source="owner/name").public.source == "owner/name"


def test_latents_are_normalised_without_changing_the_images() -> None:
    from lora_ws.zoo.base import _normalise_latents

    spec = load_spec(BaseSpec, spec_files("training")["zoo/digit_sd"])
    pipeline = build_pipeline(spec.size, ["even"])
    data = load_photos(PhotoSpec(), 16).tensor()[:200]
    raw = encode_images(pipeline, data)
    before = decode_latents(pipeline, raw)
    _normalise_latents(pipeline, data)
    latents = encode_images(pipeline, data)
    # A small spread around a large mean loses digits.
    size = float(raw.abs().max() / raw.std((0, 2, 3)).min())
    bound = rounding(terms_of(pipeline.vae), size=size)
    torch.testing.assert_close(decode_latents(pipeline, latents), before, atol=bound, rtol=0)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=bound, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=bound, rtol=0)


def test_min_snr_caps_the_loss_of_the_image() -> None:
    from lora_ws.zoo.base import _loss_weights

    alphas = torch.tensor([0.999, 0.9, 0.5, 0.01])
    assert _loss_weights(alphas, None).tolist() == [1, 1, 1, 1]
    # The image's error is the noise's over the signal-to-noise ratio: 999, 9, 1 and 1 / 99.
    torch.testing.assert_close(_loss_weights(alphas, 5.0), torch.tensor([5 / 999, 5 / 9, 1.0, 1.0]))
