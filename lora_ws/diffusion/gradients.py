"""Gradients by the weights of a model that is frozen."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def requires_grad(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set ``requires_grad`` of weights until the block ends, and then what it was before."""
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, asked in before:
            weight.requires_grad_(asked)
