"""How the numerical libraries compute: on how many CPU threads, and with which numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

# The smallest number of all; as text, because a literal read while such are 0 would be 0.
SUBNORMAL = "5e-324"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Bound torch and the BLAS behind numpy: results depend on it in their last bits.

    Whatever trains does so inside; numbers that are next to nothing are 0 there (`flushed`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count), flushed():
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed() -> Iterator[None]:
    """Take subnormal numbers for 0 in this thread; it stays as it is where processors cannot.

    Averages of gradients that stay 0 decay into such numbers, with which processors take many times
    as long, and which are far below what an optimizer adds to its divisor.
    """
    before = flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flushes() -> bool:
    """Whether subnormal numbers are 0 in this thread; torch sets it, but does not tell."""
    return float(SUBNORMAL) * 1.0 == 0.0
