from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lora_ws.adapters import Layout
from lora_ws.cli import main
from lora_ws.collection import AdapterSet, DatasetCard
from lora_ws.errors import DataError
from lora_ws.zoo.baselines import baselines_markdown, measure_baselines

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
    found = {(b.inputs, b.split): b for b in measure_baselines(zoo, latents)}
    for split in ("part", "leaf_part"):
        assert found["chance", split].accuracy == 0.5
        assert found["B only", split].accuracy > 0.95
        assert abs(found["A only", split].accuracy - 0.5) < 0.2
        assert abs(found["norms only", split].accuracy - 0.5) < 0.2
        assert found["mean latent of the images", split].accuracy == 1
    assert found["B only", "part"].n_test == 60
    assert found["B only", "leaf_part"].n_test == 60
    assert found["norms only", "part"].numbers == 128
    assert found["A only", "part"].numbers + found["B only", "part"].numbers == 7072


def test_without_photos_their_row_is_missing(zoo: AdapterSet) -> None:
    table = baselines_markdown(measure_baselines(zoo))
    assert "mean latent" not in table
    assert "| chance |  | 50.0 / 50.0 |" in table


def test_a_collection_without_parts_is_refused(zoo: AdapterSet) -> None:
    plain = replace(zoo, rows=zoo.rows.drop_columns(["leaf_part"]))
    with pytest.raises(DataError, match="no column `leaf_part`"):
        measure_baselines(plain)


def test_command_finds_the_photos_of_the_recipe(tmp_path: Path, capsys) -> None:
    store = tmp_path / "zoo"
    assert main(["zoo", "build", "--out", str(store), "--finetune.steps", "2"]) == 0
    assert main(["zoo", "baselines", str(store)]) == 0
    assert "| mean latent of the images | 256 |" in capsys.readouterr().out
    assert main(["zoo", "baselines", str(store), "--photos", str(tmp_path / "no.parquet")]) == 2
    assert "no file" in capsys.readouterr().err
