"""Real adapters of the bundled collection."""

import pytest

from lora_ws.collection import AdapterSet, load


@pytest.fixture(scope="session")
def mini(_cache: None) -> AdapterSet:
    """500 adapters, each of an initial A of its own."""
    return load("lora-ws-mini", subset="per_adapter/class")


@pytest.fixture(scope="session")
def twins(_cache: None) -> AdapterSet:
    """Adapters of the same images and seeds as `mini`, row by row, trained with another prompt."""
    return load("lora-ws-mini", subset="per_adapter/constant")
