"""Many small networks as one: a step of all costs hardly more launches than a step of one."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from lora_ws.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


class Stacked(nn.Module, ABC, Generic[M]):
    """Networks of one shape whose weights are stacked: the first axis is the network."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def forward(
        self, rows: Float[Tensor, "*models rows params"]
    ) -> Float[Tensor, "models rows outputs"]:
        """Return outputs of each network, on rows of its own or on rows shared by all."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers per row that a layer takes at most, by which memory is bounded."""

    @abstractmethod
    def keep(self, models: Int[Tensor, " kept"]) -> None:
        """Drop all networks but these, in this order."""

    @abstractmethod
    def unstack(self, model: int) -> M:
        """One network on its own, with a copy of the weights."""


@final
class ManyModules(Stacked[M]):
    """Any networks of one shape, by `torch.vmap`.

    Buffers that a state dict holds belong to each network; others are shared.

    Args:
        modules: the networks; their weights are copied.

    Example:
        >>> many = ManyModules([nn.Linear(7, 10) for _ in range(3)])
        >>> many(torch.zeros(2, 7)).shape
        torch.Size([3, 2, 10])
    """

    def __init__(self, modules: Sequence[M]) -> None:
        super().__init__()
        check_one_shape(modules)
        held = [dict(module.named_parameters()) for module in modules]
        self._names = tuple(held[0])
        self._weights = nn.ParameterList(
            torch.stack([own[name].detach() for own in held]) for name in self._names
        )
        states = [module.state_dict() for module in modules]
        self._own = tuple(name for name in states[0] if name not in held[0])
        for number, name in enumerate(self._own):
            self.register_buffer(f"_own{number}", torch.stack([state[name] for state in states]))
        # In a tuple, so that its weights are not counted among those of the stack.
        self._template = (copy.deepcopy(modules[0]),)

    def __len__(self) -> int:
        return len(self._weights[0])

    def forward(
        self, rows: Float[Tensor, "*models rows params"]
    ) -> Float[Tensor, "models rows outputs"]:
        """Return outputs of each network, on rows of its own or on rows shared by all."""
        (template,) = self._template

        def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(template, state, (x,))

        shared = rows.ndim == 2 or len(rows) == 1 != len(self)
        if shared and rows.ndim == 3:
            rows = rows[0]
        own = torch.vmap(call, in_dims=(0, None if shared else 0), randomness="different")
        return own(self._state(), rows)

    @property
    def width(self) -> int:
        """The widest side of a weight: a guess."""
        return max(size for weight in self._weights for size in weight.shape[1:])

    def keep(self, models: Int[Tensor, " kept"]) -> None:
        """Drop all networks but these, in this order."""
        for parameter in self._weights:
            parameter.data, parameter.grad = parameter.data[models], None
        for number in range(len(self._own)):
            name = f"_own{number}"
            setattr(self, name, getattr(self, name)[models])

    def unstack(self, model: int) -> M:
        """One network on its own, with a copy of the weights."""
        alone = copy.deepcopy(self._template[0])
        alone.load_state_dict({name: v[model].detach() for name, v in self._state().items()})
        return alone

    def train(self, mode: bool = True) -> "ManyModules[M]":
        """Set the mode of the networks."""
        self._template[0].train(mode)
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> "ManyModules[M]":  # type: ignore[no-untyped-def]
        self._template[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _state(self) -> dict[str, Tensor]:
        own = [getattr(self, f"_own{number}") for number in range(len(self._own))]
        return dict(zip((*self._names, *self._own), (*self._weights, *own), strict=True))


def check_one_shape(modules: Sequence[nn.Module]) -> None:
    """Refuse networks that differ in shape, or none at all."""
    shapes = {tuple((k, tuple(v.shape)) for k, v in m.state_dict().items()) for m in modules}
    if len(shapes) != 1:
        raise ConfigError(
            f"expected networks of one shape to stack, got {len(shapes)} shapes; stack each shape "
            "on its own"
        )
