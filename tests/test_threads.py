"""Subnormal numbers are 0 where something trains, there alone, and in nested and failing blocks."""

import pytest
import torch

from lora_ws.threads import flushed, flushes, threads


def product() -> float:
    return float(torch.tensor(1e-40) * 1.0)


def test_subnormal_numbers_are_zero_inside_alone() -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor knows no such mode")
    assert product() > 0
    with flushed():
        assert product() == 0
        with threads(1):
            assert product() == 0
            assert flushes()
        assert product() == 0
    assert product() > 0
    with pytest.raises(KeyError), threads(1):
        raise KeyError
    assert product() > 0
    assert not flushes()
