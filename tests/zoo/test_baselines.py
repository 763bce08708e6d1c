from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tolerances import rounding, terms_of

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, DatasetCard
from lora_ws.diffusion.pipeline import encode_images, load_pipeline
from lora_ws.diffusion.prompts import encode_prompts
from lora_ws.errors import DataError
from lora_ws.zoo.baselines import PhotoInputs, baselines_markdown, measure_baselines
from lora_ws.zoo.oracle import TIMESTEPS, photo_features

CLASSES = ("cat", "dog")


@pytest.fixture
def zoo() -> AdapterSet:
    """B tells the class, A tells nothing; every norm is the same."""
    rng = np.random.default_rng(0)
    layout = Layout.known("tiny_sd_qv")
    code = np.arange(200) % 2
    weights = rng.standard_normal((200, layout.size)).astype(np.float32)
    for _, _, up in layout.pairs():
        weights[:, up.start] += np.where(code, 2, -2)
    for matrix in layout.matrices:
        weights[:, matrix.columns] /= np.linalg.norm(
            weights[:, matrix.columns], axis=1, keepdims=True
        )
    parts = np.repeat(["train", "val", "test"], [120, 20, 60])
    rows = pa.table(
        {
            "category_label": np.array(CLASSES)[code],
            "part": parts,
            "leaf_part": parts[::-1].copy(),
            "images": [[f"{c}a", f"{c}b"] for c in code],
        }
    )
    return AdapterSet(weights, layout, rows, DatasetCard(name="planted", classes=CLASSES))


def test_each_input_tells_what_was_planted(zoo: AdapterSet) -> None:
    latents = {f"{c}{k}": np.full(4, c + 0.1 * (k == "a")) for c in (0, 1) for k in "ab"}
    # One photo of each class misleads; the other is sure.
    features = {
        f"{c}{k}": np.array([[3.0, -0.1][k == "b"] * (2 * c - 1)]) for c in (0, 1) for k in "ab"
    }
    photos = PhotoInputs(latents, features)
    found = {(b.inputs, b.split): b for b in measure_baselines(zoo, photos)}
    for split in ("part", "leaf_part"):
        assert found["chance", split].accuracy == 0.5
        assert found["B only", split].accuracy > 0.95
        assert abs(found["A only", split].accuracy - 0.5) < 0.2
        assert abs(found["norms only", split].accuracy - 0.5) < 0.2
        assert found["mean latent of the images", split].accuracy == 1
        assert found["image oracle", split].accuracy == 1
    assert found["B only", "part"].n_test == 60
    assert found["B only", "leaf_part"].n_test == 60
    assert found["norms only", "part"].numbers == 128
    assert found["A only", "part"].numbers + found["B only", "part"].numbers == 7072


def test_without_photos_their_row_is_missing(zoo: AdapterSet) -> None:
    table = baselines_markdown(measure_baselines(zoo))
    assert "mean latent" not in table
    assert "| image oracle" not in table
    assert "| chance |  | 50.0 / 50.0 |" in table


def test_a_collection_without_parts_is_refused(zoo: AdapterSet) -> None:
    plain = replace(zoo, rows=zoo.rows.drop_columns(["leaf_part"]))
    with pytest.raises(DataError, match="no column `leaf_part`"):
        measure_baselines(plain)


@pytest.mark.slow
def test_command_finds_the_photos_of_the_recipe(tmp_path: Path, capsys) -> None:
    store = tmp_path / "zoo"
    assert main(["zoo", "build", "--out", str(store), "--finetune.steps", "2"]) == 0
    assert main(["zoo", "baselines", str(store)]) == 0
    told = capsys.readouterr().out
    assert "| mean latent of the images | 256 |" in told
    assert "| image oracle |  |" in told
    assert main(["zoo", "baselines", str(store), "--photos", str(tmp_path / "no.parquet")]) == 2
    assert "no file" in capsys.readouterr().err


def test_photo_features_are_the_means_and_spreads_of_what_blocks_give() -> None:
    pipeline, images = load_pipeline("digit-sd"), torch.randn(3, 3, 16, 16)
    found = photo_features(pipeline, images)
    unet, latents = pipeline.unet, encode_images(pipeline, images)
    widths = [
        b.resnets[-1].out_channels for b in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    ]
    assert found.shape == (3, 2 * len(TIMESTEPS) * sum(widths))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = pipeline.scheduler.add_noise(latents, noise, torch.full((3,), TIMESTEPS[0]))
    text = encode_prompts(pipeline, [""]).expand(3, -1, -1)
    seen = []
    handle = unet.conv_norm_out.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    with torch.no_grad():
        unet(noisy, TIMESTEPS[0], encoder_hidden_states=text)
    handle.remove()
    last = seen[0].flatten(2).numpy().astype(np.float64)
    at = 2 * sum(widths[:-1])
    own = found[:, at : at + 2 * widths[-1]]
    expected = np.concatenate([last.mean(2), last.std(2)], 1)
    np.testing.assert_allclose(
        own, expected, rtol=0, atol=rounding(terms_of(unet), size=float(abs(last).max()))
    )
