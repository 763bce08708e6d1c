"""`AdapterBank`: every sample of a batch gets its own mixture of adapters.

The bank holds the factors of N adapters and leaves the model alone: while it is attached, forward
hooks add ``sum_n scales[b, n] * B_n A_n x_b`` to what the named modules return for sample b. At a
convolution x_b are the patches that its kernel sees.
Training many adapters at once, composing them and leaving some out are three kinds of ``scales``:
one adapter per row, a weighted row, rows with zeros.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.adapters.adapter import Module, lay_out
from lora_ws.adapters.bases import layout_base
from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.adapters.reader import Adapter
from lora_ws.diffusion.mixture import Mixture
from lora_ws.diffusion.targets import adapted_modules, check_whole, find_module
from lora_ws.errors import AdapterError, ConfigError, LayoutError

Init = Literal["shared", "per_adapter"]
Rows = np.ndarray | Tensor


class AdapterBank(nn.Module):
    """Factors of N adapters for the linear modules and 2-D convolutions of a model.

    Adapters may differ in rank and in the modules they adapt: what one lacks is zeros, which stay
    zeros in training. The bank's own parameters are the factors, so ``bank.to(...)`` moves them and
    an optimizer takes ``bank.parameters()``; freeze the model with ``model.requires_grad_(False)``.
    While attached the factors follow each module's input in device and dtype; a bank with adapters
    to train keeps its dtype. The dtype of the module's output stays.

    Args:
        layouts: what each adapter adapts.
        rows: the adapters' factors in layout order, update ``B @ A``, one flat vector each.
        trainable: which adapters get gradients; the others stay as they are.
        dtype: of the factors.
        kernels: layer -> size of the kernel, of convolutions where it is known.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> bank = AdapterBank.fresh(Layout.from_layers([LayerSpec("0", 3, 4)]), 2)
        >>> with bank.attach(model, torch.eye(2)):  # sample 0 uses adapter 0, sample 1 adapter 1
        ...     model(torch.ones(2, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        rows: Sequence[Rows] | Rows,
        trainable: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        kernels: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.kernels = dict(kernels or {})
        self.layouts = tuple(layouts)
        self.layout = _union(self.layouts)
        self.trainable = _indices(trainable, len(self))
        # Those trained are stored first, so that gradients and optimizers see only them.
        order = [*self.trainable, *sorted(set(range(len(self))) - set(self.trainable))]
        self._slot = torch.tensor(order).argsort()
        flat = _flat_rows(self.layouts, rows)
        stacks = _stack(self.layout, [(self.layouts[n], flat[n]) for n in order], dtype)
        self.factors = nn.ModuleList(_Factors(*pair, len(self.trainable)) for pair in stacks)

    @classmethod
    def from_rows(
        cls,
        weights: Rows,
        layout: Layout,
        trainable: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> "AdapterBank":
        """Build from rows of a collection: ``from_rows(adapters.weights[:5], adapters.layout)``."""
        return cls([layout] * len(weights), weights, trainable, dtype)

    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[Adapter],
        ignore_other: bool = False,
        trainable: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> "AdapterBank":
        """Build from adapters read from files, of any ranks, with the scales their files ask for.

        Args:
            adapters: what `read_adapter` returned.
            ignore_other: leave out what the files hold beside linear modules and 2-D convolutions
                of a U-Net, such as those of a text encoder; otherwise such a file is refused.
            trainable: which adapters get gradients.
            dtype: of the factors.

        Raises:
            AdapterError: a file holds more than the bank can apply, or nothing that it can.
        """
        parts = [adapted_modules(adapter) for adapter in adapters]
        for adapter, modules in zip(adapters, parts, strict=True):
            if not ignore_other:
                check_whole(adapter, modules)
            if not modules:
                raise AdapterError(
                    f"{adapter.source}: adapts only {', '.join(sorted(adapter.components))}; "
                    "expected linear modules or 2-D convolutions of a U-Net or transformer",
                    "foreign",
                )
        return cls.from_modules(parts, trainable, dtype)

    @classmethod
    def from_modules(
        cls,
        adapters: Sequence[Mapping[str, Module]],
        trainable: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> "AdapterBank":
        """Build from modules of adapters by their names in the model; none are zeros.

        Raises:
            LayoutError: they are not of one base.
        """
        some = next(item for modules in adapters for item in modules.items())
        layouts = [
            Layout.from_layers(
                [LayerSpec(name, m.inputs, m.outputs, m.rank) for name, m in modules.items()]
                or [LayerSpec(some[0], some[1].inputs, some[1].outputs)]
            )
            for modules in adapters
        ]
        rows = [lay_out(*pair) for pair in zip(adapters, layouts, strict=True)]
        return cls(layouts, rows, trainable, dtype, _kernels(adapters))

    @classmethod
    def fresh(
        cls,
        layout: Layout,
        n: int,
        init: Init = "per_adapter",
        seed: int = 0,
        trainable: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "AdapterBank":
        """Build untrained adapters: A normal with standard deviation 1/rank, B zero.

        Args:
            layout: what each adapts.
            n: how many.
            init: "per_adapter": adapter i draws its A from ``seed + i``, however many there are;
                "shared": every A is that of ``seed``.
            seed: where the draws start.
            trainable: which adapters get gradients; all by default.
            dtype: of the factors.
        """
        if n < 1 or init not in ("shared", "per_adapter"):
            raise ConfigError(
                f"expected n of at least 1 and init `shared` or `per_adapter`, got {n} and {init!r}"
            )
        seeds = [seed + i * (init == "per_adapter") for i in range(n)]
        rows = {s: _initial_row(layout, s) for s in dict.fromkeys(seeds)}
        every = range(n) if trainable is None else trainable
        return cls([layout] * n, [rows[s] for s in seeds], every, dtype)

    def __len__(self) -> int:
        return len(self.layouts)

    def extra_repr(self) -> str:
        """Describe the bank, for printing."""
        return f"{len(self)} adapters, {len(self.trainable)} trained, {len(self.factors)} modules"

    def modules_of(self, model: nn.Module) -> list[nn.Module]:
        """List the modules of a model that are adapted, in the layout's order.

        Raises:
            LayoutError: the model has no such module, or it does not fit: another base.
        """
        layers = self.layout.layers
        try:
            return [find_module(model, x, self.kernels.get(x.name, ())) for x in layers]
        except LayoutError as error:
            base = layout_base(self.layout).name
            raise LayoutError(f"the adapters were made for {base}: {error}") from error

    @contextmanager
    def attach(self, model: nn.Module, scales: Any) -> Iterator["Mixture"]:
        """Let the model run with adapters until the block ends, however it ends.

        A model that checkpoints gradients runs again in ``backward``: call it inside the block.

        Args:
            model: holds the modules that the layout names.
            scales: ``[rows, N]``, or ``[N]`` for one mixture for all. A batch of a multiple of
                ``rows`` repeats them in blocks, as guidance puts the unconditional batch before
                the conditional one. They may ask for gradients.

        Yields:
            The mixture, whose `Mixture.set` changes the scales between calls of the model.

        Raises:
            LayoutError: the model has no such module, or it does not fit.
            ConfigError: the scales, or in a forward pass the batch, do not fit.
        """
        modules = self.modules_of(model)
        mixture = Mixture(self._slot, scales)
        with ExitStack() as stack:
            for handle in mixture.watch(model):
                stack.callback(handle.remove)
            for layer, factors, module in zip(
                self.layout.layers, self.factors, modules, strict=True
            ):
                hook = mixture.hook(layer.name, factors, follow=not self.trainable)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield mixture

    def rows(self) -> Float[Tensor, "adapters params"]:
        """List all adapters as rows of `layout`, in float32 if the bank is of lower precision."""
        parts = [f.flatten(1) for factors in self.factors for f in factors()]
        return _widen(torch.cat(parts, dim=1))[self._slot.to(parts[0].device)]

    def row(self, n: int) -> Float[Tensor, " params"]:
        """Return one adapter in its own layout, ``layouts[n]``, without padding."""
        own = {layer.name: layer.rank for layer in self.layouts[n].layers}
        slot, parts = int(self._slot[n]), []
        for layer, factors in zip(self.layout.layers, self.factors, strict=True):
            down, up = factors()
            rank = own.get(layer.name, 0)
            parts += [down[slot, :rank].flatten(), up[slot, :, :rank].flatten()]
        return _widen(torch.cat(parts))

    def clip_grad_norm(self, max_norm: float) -> Float[Tensor, " adapters"]:
        """Scale each adapter's gradient to at most this norm, as if it were trained alone.

        Returns:
            The norms before, 0 for adapters without gradients.
        """
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if not grads:
            return torch.zeros(len(self))
        norms = torch.stack([_widen(grad).flatten(1).norm(dim=1) for grad in grads])
        norms = norms.norm(dim=0)
        factor = (max_norm / (norms + 1e-6)).clamp(max=1)
        for grad in grads:
            grad.mul_(factor[:, None, None].to(grad.dtype))
        result = norms.new_zeros(len(self))
        result[list(self.trainable)] = norms
        return result


class _Factors(nn.Module):
    """A and B of all adapters at one module, those of the trained adapters first."""

    def __init__(self, down: Tensor, up: Tensor, trained: int) -> None:
        super().__init__()
        self.down = nn.Parameter(down[:trained].clone(), requires_grad=trained > 0)
        self.up = nn.Parameter(up[:trained].clone(), requires_grad=trained > 0)
        self.frozen_down = nn.Parameter(down[trained:].clone(), requires_grad=False)
        self.frozen_up = nn.Parameter(up[trained:].clone(), requires_grad=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """``[N, rank, in]`` and ``[N, out, rank]`` in order of storage."""
        if not len(self.frozen_down):
            return self.down, self.up
        if not len(self.down):
            return self.frozen_down, self.frozen_up
        return torch.cat([self.down, self.frozen_down]), torch.cat([self.up, self.frozen_up])


def _indices(trainable: Sequence[int], adapters: int) -> tuple[int, ...]:
    wrong = [n for n in trainable if n not in range(adapters)]
    if wrong:
        raise ConfigError(f"trainable: expected numbers from 0 to {adapters - 1}, got {wrong[0]}")
    return tuple(sorted(set(trainable)))


def _kernels(adapters: Sequence[Mapping[str, Module]]) -> dict[str, tuple[int, ...]]:
    """Kernels larger than 1x1, which all adapters have to share."""
    kernels: dict[str, tuple[int, ...]] = {}
    for name, module in (item for modules in adapters for item in modules.items()):
        if prod(module.kernel) > 1 and kernels.setdefault(name, module.kernel) != module.kernel:
            raise LayoutError(
                f"`{name}` has a kernel of {kernels[name]} in one adapter and of {module.kernel} "
                "in another: not of one base"
            )
    return kernels


def _union(layouts: Sequence[Layout]) -> Layout:
    """Join layouts: every layer that any adapter has, at the highest rank."""
    if not layouts:
        raise ConfigError("expected at least one adapter, got none")
    layers: dict[str, LayerSpec] = {}
    for layer in (layer for layout in dict.fromkeys(layouts) for layer in layout.layers):
        known = layers.setdefault(layer.name, layer)
        layers[layer.name] = replace(known, rank=max(known.rank, layer.rank))
        if replace(known, rank=layer.rank) != layer:
            raise LayoutError(
                f"`{layer.name}` maps {known.in_features} to {known.out_features} in one adapter "
                f"and {layer.in_features} to {layer.out_features} in another: not of one base"
            )
    return Layout.from_layers(layers.values())


def _flat_rows(layouts: Sequence[Layout], rows: Sequence[Rows] | Rows) -> list[Tensor]:
    if len(rows) != len(layouts):
        raise ConfigError(f"expected {len(layouts)} rows for as many layouts, got {len(rows)}")
    flat = [row if isinstance(row, Tensor) else torch.tensor(row) for row in rows]
    for n, (layout, row) in enumerate(zip(layouts, flat, strict=True)):
        if tuple(row.shape) != (layout.size,):
            raise LayoutError(
                f"adapter {n}: expected {layout.size} numbers in a row for its layout, "
                f"got shape {list(row.shape)}"
            )
    return flat


def _stack(
    layout: Layout, adapters: Sequence[tuple[Layout, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack A ``[N, rank, in]`` and B ``[N, out, rank]`` of each layer, padded with zeros."""
    known = {own: {x.name: (x, a, b) for x, a, b in own.pairs()} for own, _ in adapters}
    rows = [(known[own], row) for own, row in adapters]
    for layer in layout.layers:
        down = torch.zeros(len(adapters), *layer.down_shape, dtype=dtype)
        up = torch.zeros(len(adapters), *layer.up_shape, dtype=dtype)
        for n, (columns, row) in enumerate(rows):
            if layer.name in columns:
                spec, a, b = columns[layer.name]
                down[n, : spec.rank] = row[a].view(spec.down_shape)
                up[n, :, : spec.rank] = row[b].view(spec.up_shape)
        yield down, up


def _initial_row(layout: Layout, seed: int) -> Tensor:
    """Draw A normal with standard deviation 1/rank, layer by layer on the CPU; B is zero."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.zeros(layout.size)
    for layer, down, _ in layout.pairs():
        row[down] = torch.randn(down.stop - down.start, generator=generator) / layer.rank
    return row


def _widen(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
