"""How far two right computations of one number may be apart: bounds from arithmetic.

A processor adds in whatever order suits it and fuses multiplications with additions, so that two
kernels differ in the last bits of every sum. A bound taken from one machine fails on the next; a
bound from here holds on all of them.

**In float64** compare with `EXACT`. A million terms leave 4e-13 of their size (the formula below),
so a condition of a thousand still keeps to it, and no fault is that small. Prefer this wherever
the code under test can be run in float64.

**In float32 and bfloat16** compare with `rounding`. A sum of n terms of random signs, each of size
t, is about sqrt(n) t. Every addition rounds a partial sum, of size sqrt(k) t after k terms, by at
most half of eps, with standard deviation ``eps / sqrt(12)``. The n errors are as good as
independent (Higham and Mary, SIAM J. Sci. Comput. 41, 2019), so together they have

    sqrt(sum_k k) t eps / sqrt(12)  =  0.2 sqrt(n) eps |sum|

and the difference of two such sums 0.3 sqrt(n) eps |sum|. `rounding` allows 2, seven standard
deviations; summing in blocks, as all kernels do, only makes errors smaller. Where terms are of one
sign the sum is larger and its relative error smaller; where they cancel, pass as ``size`` what they
would add up to if they did not.

* ``terms``: additions behind one number. Layers of a network round one after another, so the terms
  of all of them count: `terms_of`.
* ``size``: of the sums. For relative bounds it is 1, the default.
* ``steps``: how often a result goes in again, as in a sampler or an optimiser. Errors of steps
  share their weights and may all point one way, so they count linearly, not by their root; what a
  step multiplies by, such as guidance, multiplies here too.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

# Relative and absolute, for numbers of size one in float64.
EXACT = 1e-9


def rounding(
    terms: int, *, size: float = 1.0, steps: float = 1, dtype: torch.dtype | type = torch.float32
) -> float:
    """Largest difference that rounding alone makes, as ``atol`` of a size, or as ``rtol``."""
    finfo = torch.finfo if isinstance(dtype, torch.dtype) else np.finfo
    return 2 * float(finfo(dtype).eps) * math.sqrt(terms) * size * steps


def slope(value: Callable[[float], float], step: float) -> tuple[float, float]:
    """Derivative at 0 of a function in float64, and how far it may be off.

    Central differences at h and 2h are off by c h^2 and 4 c h^2: what they differ by is three times
    the error of the first, so it bounds that also where higher powers of h count.
    """
    ends = {k: value(k * step) for k in (-2, -1, 1, 2)}
    near, far = (ends[1] - ends[-1]) / (2 * step), (ends[2] - ends[-2]) / (4 * step)
    return near, abs(near - far) + EXACT * max(map(abs, ends.values())) / step


def terms_of(*models: nn.Module) -> int:
    """Terms of all sums of a pass through models: inputs of every matrix, one after another."""
    matrices = (p for model in models for p in model.parameters() if p.ndim > 1)
    return sum(matrix[0].numel() for matrix in matrices)


def of_images(pipeline: Any, steps: int, guidance: float = 1.0) -> float:
    """Largest difference by rounding of two images of -1 to 1 that a sampler makes.

    Guided noise is ``guidance`` times one prediction less ``guidance - 1`` times another.
    """
    names = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    parts = [getattr(pipeline, name, None) for name in names]
    terms = terms_of(pipeline.vae.decoder, *(part for part in parts if part is not None))
    return rounding(terms, steps=steps * (2 * guidance - 1))
