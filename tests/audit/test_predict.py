"""The shipped reader: what `predict` takes by default, how it reads, and that a recipe makes it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_ws
from lora_ws.audit.predict import PredictSpec, predict_files
from lora_ws.bundle import Bundle
from lora_ws.bundle.hub import fetch_bundle
from lora_ws.collection import AdapterSet
from lora_ws.config import load_spec, spec_root
from lora_ws.errors import NotAvailableError
from lora_ws.learn.run import run
from lora_ws.learn.spec import ExperimentSpec


def test_rows(subset: str) -> tuple[AdapterSet, np.ndarray, np.ndarray]:
    adapters = lora_ws.load("lora-ws-mini").subset(subset)
    rows = np.flatnonzero(adapters.column("part").astype(str) == "test")
    return adapters, rows, adapters.column("category_label").astype(str)[rows]


test_rows.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("subset", ["per_adapter/constant", "per_adapter/class", "shared/class"])
def test_the_shipped_reader_names_classes_whatever_the_prompt_and_the_start(subset: str) -> None:
    bundle = PredictSpec().bundle()
    adapters, rows, truth = test_rows(subset)
    guess = np.array(bundle.classes)[bundle.predict_proba(adapters.weights[rows]).argmax(1)]
    # Measured: 91, 90 and 87 %; ties between votes may fall otherwise elsewhere.
    assert (guess == truth).mean() > 0.84


def test_predict_takes_it_where_no_model_is_given(tmp_path: Path) -> None:
    adapters, rows, _ = test_rows("per_adapter/constant")
    row, tensors = adapters.weights[rows[0]], {}
    for layer, down, up in adapters.layout.pairs():
        tensors[f"unet.{layer.name}.lora_A.weight"] = row[down].reshape(layer.down_shape)
        tensors[f"unet.{layer.name}.lora_B.weight"] = row[up].reshape(layer.up_shape)
    file = tmp_path / "one.safetensors"
    save_file(tensors, file)
    (finding,) = predict_files([str(file)], PredictSpec())
    assert finding.verdict is not None
    bundle = PredictSpec().bundle()
    expected = bundle.predict_proba(row[None])[0]
    given = [finding.verdict.probabilities[name] for name in bundle.classes]
    # Of a file as of a row, to the four digits that float32 kernels leave a softmax.
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_a_name_that_is_not_shipped_is_refused() -> None:
    with pytest.raises(NotAvailableError, match=r"nor shipped \(tiny-sd\)"):
        fetch_bundle("tiny", None)


@pytest.mark.slow
def test_the_recipe_makes_the_shipped_reader(tmp_path: Path) -> None:
    recipe = spec_root("training") / "metanetworks/update_kernel_refit.yaml"
    spec = load_spec(ExperimentSpec, recipe)
    run(replace(spec, subset="per_adapter/constant"), tmp_path / "run")
    made, shipped = Bundle.load(tmp_path / "run" / "bundle"), PredictSpec().bundle()
    adapters, rows, _ = test_rows("per_adapter/constant")
    weights = adapters.weights[rows]
    np.testing.assert_allclose(
        made.predict_proba(weights), shipped.predict_proba(weights), atol=1e-3
    )
