"""digit-sd, loaded once."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora_ws.diffusion.pipeline import load_pipeline


@pytest.fixture(scope="session")
def digit_sd() -> Any:
    """For fixtures that outlive a test."""
    return load_pipeline("digit-sd")


@pytest.fixture
def pipeline(digit_sd: Any) -> Iterator[Any]:
    """Left as it was found, by every test."""
    before = copy.deepcopy(digit_sd.unet.state_dict())
    yield digit_sd
    unet = digit_sd.unet
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    assert not any(weight.requires_grad for weight in unet.parameters())
