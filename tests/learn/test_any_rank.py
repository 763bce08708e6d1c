"""Readers trained at rank 1, on the same updates at other ranks and in other formats of files."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from tolerances import rounding

from lora_ws.adapters import Layout, read_adapter
from lora_ws.adapters.locate import AdapterRef
from lora_ws.adapters.projection import project_adapter
from lora_ws.adapters.writer import write_adapter
from lora_ws.audit.classify import classify_files
from lora_ws.bundle import Bundle
from lora_ws.bundle.confidence import Prediction
from lora_ws.bundle.evidence import layer_evidence
from lora_ws.errors import LayoutError
from lora_ws.featurizers import FlatVec
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import (
    MLP,
    W2T,
    DeepSets,
    Metanetwork,
    OAlignMLP,
    SignNet,
    SketchTransformer,
    SpectralMLP,
)

ANY_RANK: list[Metanetwork] = [
    DeepSets(width=8, probes=4),
    SignNet(hidden=4, features=3, width=8),
    W2T(width=8, depth=1, heads=2, signs="even"),
    SketchTransformer(probes=3, width=8, token=8, depth=1, heads=2),
]


@lru_cache(maxsize=1)
def trained(model: Metanetwork) -> tuple[Bundle, np.ndarray]:
    """A bundle of a network after an epoch on lora-ws-mini, and rows that it has not seen."""
    featurizer = FlatVec() if model.reads == "features" else None
    spec = ExperimentSpec(featurizer=featurizer, model=model, fit=FitSpec(max_epochs=1))
    prepared = prepare(spec)
    rows = prepared.adapters.weights[prepared.split.test[:2]]
    return make_bundle(fit_seed(spec, prepared, 0)), np.array(rows)


def tensors(row: np.ndarray, layout: Layout, rank: int) -> dict[str, np.ndarray]:
    """Factors of a rank-1 adapter at another rank, as diffusers names them: B R and R⁺ A."""
    rng, found = np.random.default_rng(0), {}
    for layer, down, up in layout.pairs():
        mixing = rng.standard_normal((layer.rank, rank)) if rank > layer.rank else np.eye(rank)
        wide = np.linalg.pinv(mixing) @ row[down].reshape(layer.down_shape)
        stem = f"unet.{layer.name}.lora"
        found[f"{stem}.down.weight"] = wide.astype(np.float32)
        found[f"{stem}.up.weight"] = (row[up].reshape(layer.up_shape) @ mixing).astype(np.float32)
    return found


def written(row: np.ndarray, layout: Layout, how: str, folder: Path) -> Path:
    """The file of an adapter: a format, or a rank, perhaps in bfloat16."""
    rank = int(how.removeprefix("rank ").split()[0]) if how.startswith("rank") else 1
    factors = tensors(row, layout, rank)
    file = folder / "adapter.safetensors"
    if how.endswith("bfloat16"):
        cast = {name: torch.from_numpy(value).bfloat16() for name, value in factors.items()}
        save_torch(cast, file)
    else:
        save_file(factors, file)
    if how in ("peft", "kohya"):
        return write_adapter(read_adapter(file), folder / how, how)  # type: ignore[arg-type]
    return file


def verdict(bundle: Bundle, row: np.ndarray, how: str, folder: Path) -> Prediction:
    folder.mkdir(parents=True)
    ref = AdapterRef.parse(written(row, bundle.layout, how, folder))
    (result,) = classify_files([ref], bundle)
    assert result.finding is not None
    assert result.finding.verdict is not None, result.finding
    return result.finding.verdict


def moved(bundle: Bundle, rows: np.ndarray, how: str, folder: Path) -> float:
    """How far outputs move at most by another spelling, over how far those of rows lie apart."""
    found = [verdict(bundle, row, how, folder / f"{how} {k}") for k, row in enumerate(rows)]
    told = [[one.probabilities[name] for name in bundle.classes] for one in found]
    expected = np.log(bundle.predict_proba(rows))
    # Logarithms of probabilities are logits, whatever the calibration's temperature.
    return float(abs(np.log(told) - expected).max() / np.ptp(expected, axis=0).max())


# In the quick suite the first two stand for all.
NETWORKS = [
    pytest.param(model, id=type(model).__name__, marks=[pytest.mark.slow] if number > 1 else [])
    for number, model in enumerate([*ANY_RANK, SpectralMLP(width=8)])
]


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORKS)
def test_networks_of_updates_read_every_spelling_alike(model: Metanetwork, tmp_path: Path) -> None:
    bundle, rows = trained(model)
    assert bundle.any_rank is (model in ANY_RANK)
    for how in ("peft", "kohya", "rank 4", "rank 8"):
        assert moved(bundle, rows, how, tmp_path) < rounding(10 * rows.shape[1])
    # Rounding each number moves outputs by a few times as much.
    assert moved(bundle, rows, "rank 4 bfloat16", tmp_path) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
@pytest.mark.parametrize("model", [MLP(hidden=(8,)), OAlignMLP(width=8)])
def test_networks_of_numbers_abstain_from_other_ranks(model: Metanetwork, tmp_path: Path) -> None:
    bundle, rows = trained(model)
    assert not bundle.any_rank
    assert moved(bundle, rows, "kohya", tmp_path) < rounding(10 * rows.shape[1])
    found = verdict(bundle, rows[0], "rank 4", tmp_path / "wide")
    assert (found.label, found.reason) == (None, "projected")
    assert moved(bundle, rows, "rank 4", tmp_path) > 0.01


def test_another_rank_is_read_as_it_is(tmp_path: Path) -> None:
    """Two adapters in one file, of which the layout's rank would lose one."""
    bundle, rows = trained(ANY_RANK[0])
    layout = bundle.layout
    one, two = (tensors(row, layout, 1) for row in rows)
    joined = {
        name: np.concatenate([one[name], two[name]], axis=1 if ".up." in name else 0)
        for name in one
    }
    file = tmp_path / "both.safetensors"
    save_file(joined, file)
    adapter = read_adapter(file)
    wide = bundle.layout_for(adapter)
    assert wide == layout.at_rank(2)
    (result,) = classify_files([AdapterRef.parse(file)], bundle)
    assert result.finding is not None
    assert result.finding.retained_energy == 1
    assert result.finding.verdict is not None
    expected = bundle.predict(adapter)
    assert result.finding.verdict.probabilities == pytest.approx(expected, rel=1e-6)
    cut = bundle.predict_proba(project_adapter(adapter, layout).weights[None])[0]
    told = np.array([expected[name] for name in bundle.classes])
    assert abs(np.log(cut) - np.log(told)).max() > 0
    evidence = layer_evidence(bundle, adapter.flat(), wide)
    padded = layout.at_rank(3)
    wider = project_adapter(adapter, padded).weights
    same = layer_evidence(bundle, wider, padded)
    assert evidence == pytest.approx(same, rel=1e-3, abs=rounding(wider.size))


def test_ranks_are_cut_to_sixteen_and_other_layers_refused(tmp_path: Path) -> None:
    bundle, rows = trained(ANY_RANK[0])
    file = written(rows[0], bundle.layout, "rank 20", tmp_path)
    assert bundle.layout_for(read_adapter(file)) == bundle.layout.at_rank(16)
    other = Layout(bundle.layout.layers[1:])
    with pytest.raises(LayoutError, match="no layer"):
        bundle.predict_proba(np.zeros((1, other.size), np.float32), other)
