"""Copies of adapters in other spellings of the same update."""

from collections.abc import Callable

import numpy as np
import torch

from lora_ws.audit.modules import set_adapters
from lora_ws.collection import AdapterSet

Rounding = Callable[[np.ndarray], np.ndarray]


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def brain(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(values)).bfloat16().float().numpy()


def adapters(zoo: AdapterSet) -> dict[str, list]:
    return {name: list(modules) for name, modules in set_adapters(zoo)}


def rounded(modules: list, rounding: Rounding) -> list:
    return [(name, rounding(down), rounding(up), s) for name, down, up, s in modules]


def split_anew(modules: list) -> list:
    """Another rank, other factors, and the scale of an alpha of 1."""
    mixing = np.random.default_rng(0).standard_normal((3, 3))
    return [
        (
            name,
            np.linalg.solve(mixing, np.pad(down, ((0, 2), (0, 0)))).astype(np.float32),
            (3 * s * np.pad(up, ((0, 0), (0, 2))) @ mixing).astype(np.float32),
            1 / 3,
        )
        for name, down, up, s in modules
    ]
