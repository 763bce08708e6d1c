"""Modules of an adapter as numbers: two factors and a scale each, checked, and in stacks."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_ws.errors import ConfigError
from lora_ws.functional.hadamard import PairProducts
from lora_ws.functional.kronecker import KroneckerProduct

# What stays a product of smaller matrices.
Product = KroneckerProduct | PairProducts
Factor = np.ndarray | Product
# Name, A, B and scale.
Module = tuple[str, Factor, Factor, float]
Modules = Iterable[Module]
# Numbers of factors that are worked on at once.
CACHED = 1 << 17


def checked(modules: Modules, *, stacks: bool = False) -> Iterator[Module]:
    """Pass modules on, refusing what is not one.

    Args:
        modules: Of one adapter.
        stacks: Whether factors may be those of n adapters, ``[n, rank, in]``, ``[n, out, rank]``.

    Yields:
        The same modules.

    Raises:
        ConfigError: If factors do not fit each other, are no matrices, or a module comes twice.

    Example:
        >>> list(checked([("to_v", np.ones((2, 3)), np.ones((4, 1)), 1.0)]))
        Traceback (most recent call last):
        lora_ws.errors.ConfigError: module `to_v`: expected A [rank, in] and B [out, rank], ...
    """
    seen = set()
    for name, down, up, scale in modules:
        fits = down.ndim == up.ndim in (2, 3 if stacks else 2) and down.shape[-2] == up.shape[-1]
        if not fits or down.shape[:-2] != up.shape[:-2]:
            raise ConfigError(
                f"module `{name}`: expected A [rank, in] and B [out, rank], got {down.shape} and "
                f"{up.shape}; flatten what is no matrix, such as the kernels of convolutions"
            )
        if name in seen:
            raise ConfigError(f"module `{name}`: expected once, got twice; sum their updates first")
        seen.add(name)
        yield name, down, up, scale


def place(name: str, down: Factor, up: Factor) -> str:
    """What modules are compared by: name and widths."""
    return f"{name} {up.shape[-2]}x{down.shape[-1]}"


def formed(factor: Factor) -> np.ndarray:
    """A factor as a matrix."""
    return factor if isinstance(factor, np.ndarray) else factor.form()


def stacks(
    factors: Mapping[Any, tuple[np.ndarray, np.ndarray]], dtype: type[np.floating]
) -> Iterator[tuple[list[Any], Float[np.ndarray, "k rank i"], Float[np.ndarray, "k o rank"]]]:
    """Factors of equal shapes together, as many as a cache holds: one call for many small ones.

    Args:
        factors: key -> A ``[rank, in]`` and B ``[out, rank]``.
        dtype: of the result.

    Yields:
        Keys, and their A and B, which may be the given ones.

    Example:
        >>> pairs = {name: (np.ones((1, 3)), np.ones((2, 1))) for name in "ab"}
        >>> [(keys, a.shape, b.shape) for keys, a, b in stacks(pairs, np.float32)]
        [(['a', 'b'], (2, 1, 3), (2, 2, 1))]
    """
    alike: dict[Any, list[Any]] = {}
    for key, (down, up) in factors.items():
        alike.setdefault((down.shape, up.shape), []).append(key)
    for (read, written), keys in alike.items():
        step = max(1, CACHED // max(1, read[0] * (read[1] + written[0])))
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            if len(part) == 1:
                # Large ones, which a copy would double.
                down, up = (side[None].astype(dtype, copy=False) for side in factors[part[0]])
                yield part, down, up
                continue
            down, up = np.empty((len(part), *read), dtype), np.empty((len(part), *written), dtype)
            for k, key in enumerate(part):
                down[k], up[k] = factors[key]
            yield part, down, up
