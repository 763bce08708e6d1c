"""Which sample of a batch gets how much of which adapter, and the arithmetic of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lora_ws.errors import ConfigError


class Mixture:
    """Which sample gets how much of which adapter, while a bank is attached.

    Args:
        slot: where each adapter stands among the stored factors.
        scales: ``[rows, N]`` or ``[N]``.
    """

    def __init__(self, slot: Int[Tensor, " adapters"], scales: Any) -> None:
        self._slot = slot
        self._batch: int | None = None
        self.set(scales)

    def set(self, scales: Any) -> None:
        """Use other scales, ``[rows, N]`` or ``[N]``, from the next call of the model on."""
        self.scales = _scales(scales, len(self._slot))
        self._plan = _make_plan(self.scales, self._slot)
        self._plans: dict[Any, _Plan] = {}

    def hook(
        self, name: str, factors: nn.Module, follow: bool = True
    ) -> Callable[..., Tensor | None]:
        """A forward hook that adds the update to what a linear module or convolution returns.

        Args:
            name: of the module, for messages.
            factors: returns A and B of all adapters.
            follow: compute in the dtype of the module's input, rather than in that of the factors.
        """
        placed = _Placed(factors, follow)

        def add(
            module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            x = args[0] if args else kwargs["input"]
            down, up = placed.at(x)
            least = 4 if isinstance(module, nn.Conv2d) else 2
            plan = self._plan_for(name, x, down, least)
            if plan is None:
                return None
            update = plan.update(x, down, up, module).reshape(output.shape)
            return (output + update).to(output.dtype)

        return add

    def watch(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Note the batch that the model is called with."""

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = (*args, *kwargs.values())
            sizes = [len(x) for x in inputs if isinstance(x, Tensor) and x.ndim > 1]
            self._batch = sizes[0] if sizes else None

        def leave(*_: Any) -> None:
            self._batch = None

        yield model.register_forward_pre_hook(enter, with_kwargs=True)
        yield model.register_forward_hook(leave, always_call=True)

    def _plan_for(self, name: str, x: Tensor, like: Tensor, least: int) -> "_Plan | None":
        """How to compute the update of an input of so many dimensions, None for no update."""
        rows, batch = len(self.scales), len(x)
        if x.ndim < least or (rows > 1 and self._batch not in (None, batch)):
            raise ConfigError(
                f"`{name}` was called on shape {list(x.shape)} in a batch of {self._batch}: "
                "mixtures of samples need the batch as first dimension of every module; "
                "give one row of scales for a model that folds other dimensions into it"
            )
        if batch % rows:
            raise ConfigError(
                f"`{name}` was called on a batch of {batch}, expected a multiple of the {rows} "
                "rows of scales; give one row per sample (guidance repeats them by itself)"
            )
        if self._plan is None:
            return None
        # What was computed without gradients must not serve a pass that needs them.
        key = batch, like.device, like.dtype, torch.is_grad_enabled()
        if key not in self._plans:
            self._plans[key] = self._plan.repeat(batch // rows, like)
        return self._plans[key]


class _Placed:
    """Factors where the input of their module is; a copy elsewhere is made once."""

    def __init__(self, factors: nn.Module, follow: bool) -> None:
        self._factors, self._follow = factors, follow
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def at(self, x: Tensor) -> tuple[Tensor, ...]:
        """A and B on the device of x, and in its dtype where they follow."""
        own = self._factors()
        if not self._follow:
            return tuple(f.to(x.device) for f in own)
        there = x.device, x.dtype
        if any(f.requires_grad for f in own):
            return tuple(f.to(*there) for f in own)
        if there not in self._copies:
            self._copies[there] = tuple(f.to(*there) for f in own)
        return self._copies[there]


@dataclass(frozen=True)
class _Plan:
    """A batch in equal groups of consecutive samples; those of a group use the same k adapters.

    Attributes:
        index: slots of the adapters, ``[groups, k]``.
        weight: their scales, ``[batch, k]``.
        whole: the index names every slot once and in order, so nothing need be gathered.
    """

    index: Int[Tensor, "groups k"]
    weight: Float[Tensor, "batch k"]
    whole: bool

    def repeat(self, times: int, like: Tensor) -> "_Plan":
        """Repeat the batch in blocks; one group stays one, whatever the size of the batch."""
        copies = 1 if len(self.index) == 1 else times
        index = self.index.to(like.device).repeat(copies, 1)
        return _Plan(index, self.weight.to(like).repeat(times, 1), self.whole and copies == 1)

    def update(self, x: Tensor, down: Tensor, up: Tensor, module: nn.Module) -> Tensor:
        """``sum_k weight * B_k A_k x`` of every sample, in the order of the module's output."""
        groups, k = self.index.shape
        if not self.whole:
            down, up = down[self.index], up[self.index]
        # The k adapters of a group are one adapter of k times the rank.
        down = down.reshape(groups, -1, down.shape[-1])
        up = up.reshape(groups, k, *up.shape[-2:]).transpose(2, 3).flatten(1, 2)
        width, x = down.shape[1], x.to(down.dtype)
        if isinstance(module, nn.Conv2d):
            hidden = _convolve(x, down, module)
        else:
            hidden = torch.bmm(x.reshape(groups, -1, x.shape[-1]), down.mT)
        weight = self.weight.repeat_interleave(width // k, dim=1)
        hidden = hidden.reshape(len(x), -1, width) * weight[:, None]
        update = torch.bmm(hidden.reshape(groups, -1, width), up)
        update = update.reshape(len(x), -1, up.shape[-1])
        return update.mT if isinstance(module, nn.Conv2d) else update


def _convolve(
    x: Float[Tensor, "batch channels height width"],
    down: Float[Tensor, "groups rank inputs"],
    module: nn.Conv2d,
) -> Float[Tensor, "batch positions rank"]:
    """Convolve each group of consecutive samples with kernels of its own, as the module would."""
    groups, rank, _ = down.shape
    padding = module.padding
    if module.padding_mode != "zeros":
        sides = module._reversed_padding_repeated_twice
        x, padding = functional.pad(x, sides, module.padding_mode), 0
    # Groups lie beside each other as channels of a grouped convolution.
    x = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
    kernels = down.reshape(groups * rank, -1, *module.kernel_size)
    hidden = functional.conv2d(x, kernels, None, module.stride, padding, module.dilation, groups)
    return hidden.flatten(2).unflatten(1, (groups, rank)).transpose(0, 1).flatten(0, 1).mT


def _make_plan(scales: Tensor, slot: Tensor) -> _Plan | None:
    """Few adapters per row: each row with its own. Otherwise all that are used, for every row."""
    # An adapter that is off everywhere costs nothing, unless its scale asks for a gradient.
    on = torch.ones_like(scales, dtype=torch.bool) if scales.requires_grad else scales != 0
    on = on.cpu()
    k, used = int(on.sum(1).max()), on.any(0).nonzero()[:, 0]
    if k == 0:
        return None
    if 2 * k > len(used):
        columns = used[None]
        weight = scales if len(used) == len(slot) else scales[:, used.to(scales.device)]
    else:
        columns = on.byte().argsort(dim=1, descending=True, stable=True)[:, :k]
        mine = on.gather(1, columns)
        weight = scales.gather(1, columns.to(scales.device)) * mine.to(scales.device)
        # A row with fewer than k names its first again, with scale 0.
        columns = torch.where(mine, columns, columns[:, :1])
        groups, counts = torch.unique_consecutive(columns, dim=0, return_counts=True)
        columns = groups if bool((counts == counts[0]).all()) else columns
    index = slot[columns]
    return _Plan(index, weight, torch.equal(index.flatten(), torch.arange(len(slot))))


def _scales(scales: Any, adapters: int) -> Float[Tensor, "rows adapters"]:
    scales = torch.as_tensor(scales)
    scales = scales if scales.is_floating_point() else scales.float()
    scales = scales[None] if scales.ndim == 1 else scales
    if scales.ndim != 2 or scales.shape[1] != adapters or not len(scales):
        raise ConfigError(
            f"expected scales of shape [rows, {adapters}] or [{adapters}], one column per adapter, "
            f"got {list(scales.shape)}"
        )
    if not bool(scales.isfinite().all()):
        raise ConfigError("expected finite scales, got NaN or infinity")
    return scales
