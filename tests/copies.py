"""Copies of adapters in other spellings of the same update."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from lora_ws.adapters import read_adapter
from lora_ws.audit.similar import adapter_modules
from lora_ws.collection import AdapterSet
from lora_ws.functional.update_modules import Module, Modules

Rounding = Callable[[np.ndarray], np.ndarray]


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def brain(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(values)).bfloat16().float().numpy()


def file_modules(path: Path) -> Iterator[Module]:
    """The modules of an adapter file, which is read when the first of them is asked for."""
    yield from adapter_modules(read_adapter(path))


def set_adapters(zoo: AdapterSet) -> Iterator[tuple[str, Modules]]:
    """Every adapter of a collection by the number of its row, for `Index.add`."""
    for row, values in enumerate(zoo.weights):
        yield (
            f"{row}",
            [
                (
                    layer.name,
                    values[down].reshape(layer.down_shape),
                    values[up].reshape(layer.up_shape),
                    1.0,
                )
                for layer, down, up in zoo.layout.pairs()
            ],
        )


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
