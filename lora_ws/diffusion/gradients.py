"""Gradients by the weights of a model that is frozen."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def asking(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let weights ask for gradients until the block ends, and then as before."""
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, asked in before:
            weight.requires_grad_(asked)
