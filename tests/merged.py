"""Copies of a denoiser with the updates of adapters in its weights, by hand."""

import copy
from collections.abc import Iterable
from typing import Any

import torch

from lora_ws.diffusion.stack import AdapterStack


class Merged:
    """Copies of a denoiser, each with some adapters of a stack merged into it."""

    def __init__(self, denoiser: Any, stack: AdapterStack) -> None:
        self._denoiser, self._stack = denoiser, stack
        self._made: dict[frozenset[int], Any] = {}

    def __getitem__(self, on: Iterable[int]) -> Any:
        on = frozenset(k for k in on if self._stack.scales[k])
        if on not in self._made:
            made, rows = copy.deepcopy(self._denoiser), self._stack.bank.rows()
            for layer, down, up in self._stack.bank.layout.pairs():
                weight = made.get_submodule(layer.name).weight
                for k in on:
                    # Scales are float32.
                    scale = float(torch.tensor(self._stack.scales[k]))
                    b, a = rows[k, up].view(layer.up_shape), rows[k, down].view(layer.down_shape)
                    weight.data += scale * b @ a
            self._made[on] = made
        return self._made[on]
