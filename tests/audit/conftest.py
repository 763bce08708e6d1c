"""Real adapters of the bundled collection."""

from pathlib import Path

import pytest

from lora_ws.collection import AdapterSet, load
from lora_ws.featurizers import DeltaPCA
from lora_ws.learn.features import prepare
from lora_ws.learn.pack import make_bundle
from lora_ws.learn.run import fit_seed
from lora_ws.learn.spec import ExperimentSpec, FitSpec
from lora_ws.models import MLP


@pytest.fixture(scope="session")
def mini(_cache: None) -> AdapterSet:
    """500 adapters, each of an initial A of its own."""
    return load("lora-ws-mini", subset="per_adapter/class")


@pytest.fixture(scope="session")
def twins(_cache: None) -> AdapterSet:
    """Adapters of the same images and seeds as `mini`, row by row, trained with another prompt."""
    return load("lora-ws-mini", subset="per_adapter/constant")


@pytest.fixture(scope="session")
def bundle(_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of updates, trained on `mini`."""
    spec = ExperimentSpec(
        subset="per_adapter/class",
        featurizer=DeltaPCA(kernel="left", landmarks=512),
        model=MLP(hidden=(64,)),
        fit=FitSpec(max_epochs=20),
    )
    prepared = prepare(spec)
    fitted = fit_seed(spec, prepared, 0)
    made = make_bundle(fitted)
    return made.save(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def layers(mini: AdapterSet) -> tuple[tuple[str, int, int], ...]:
    """What `factories.write_adapter` needs to write rows of `mini`."""
    return tuple((s.name, s.in_features, s.out_features) for s in mini.layout.layers)
