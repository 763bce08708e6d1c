"""`Adapter`: what every file becomes: modules, each with two factors and an effective scale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_ws.adapters.header import shown
from lora_ws.adapters.keys import DENOISERS
from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.errors import AdapterError, LayoutError
from lora_ws.functional.hadamard import PairProducts
from lora_ws.functional.kronecker import KroneckerProduct
from lora_ws.functional.sketch import update_norm
from lora_ws.functional.update_modules import Factor, Product

# Numbers of a factor that a product is formed to: 512 MiB.
MOST_FORMED = 1 << 27
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False, repr=False)
class Module:
    """One adapted module; its update is ``scale * up @ down``.

    Attributes:
        component: ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2`` or ``_3``.
        path: dotted module path inside it, as diffusers spells it.
        method: ``lora``, ``adalora``, ``locon``, ``tucker``, ``loha``, ``lokr`` or
            ``full``.
        down: A, float32 ``[rank, inputs]``; inputs of a convolution are channels times kernel.
        up: B, float32 ``[outputs, rank]``.
        scale: the factor that the file asks for.
        scale_source: where the file states it.
        kernel: of a convolution.
        needs_base: DoRA: this is the update's direction; its size needs the base model.

    Example:
        >>> down, up = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
        >>> module = Module("unet", "mid_block.attn2.to_v", "lora", down, up, 0.5, "alpha")
        >>> module.rank, module.scaled_up.ravel().tolist()
        (1, [0.5, 0.5])
    """

    component: str
    path: str
    method: str
    down: Float[np.ndarray, "rank inputs"]
    up: Float[np.ndarray, "outputs rank"]
    scale: float
    scale_source: str
    kernel: tuple[int, ...] = ()
    needs_base: bool = False

    def __repr__(self) -> str:
        shape = f"{self.inputs} -> {self.outputs}"
        said = f"{self.method}, rank {self.rank}, {shape}, scale {self.scale:g}"
        return f"Module({self.component} {self.path}: {said})"

    @property
    def name(self) -> str:
        """The path, with the component in front where that is not the denoiser."""
        return self.path if self.component in DENOISERS else f"{self.component}.{self.path}"

    @property
    def scaled_up(self) -> Float[np.ndarray, "outputs rank"]:
        """B with the scale folded in, in float32: the update is ``scaled_up @ down``."""
        return self.up * np.float32(self.scale)

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """A and B for measuring the update: `functional.sketch`."""
        return self.down, self.up

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.factors[1].shape[1]

    @property
    def inputs(self) -> int:
        """Columns of A."""
        return self.factors[0].shape[1]

    @property
    def outputs(self) -> int:
        """Rows of B."""
        return self.factors[1].shape[0]


class ProductModule(Module):
    """A module whose factors are products themselves, each formed when it is asked for.

    Args:
        component: as of `Module`.
        path: the same.
        method: the same.
        down: A.
        up: B.
        rest: the other fields of `Module`, in their order.
    """

    def __init__(
        self,
        component: str,
        path: str,
        method: str,
        down: Product,
        up: Product,
        *rest: Any,
    ) -> None:
        names = ("component", "path", "method", "scale", "scale_source", "kernel", "needs_base")
        values = component, path, method, *rest
        # As a frozen dataclass does.
        vars(self).update(zip(names, values, strict=True), _sides=(down, up))

    @property
    def factors(self) -> tuple[Product, Product]:
        """A and B, not formed."""
        return vars(self)["_sides"]

    @property
    def down(self) -> Float[np.ndarray, "rank inputs"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A, float32 ``[rank, inputs]``."""
        return self._formed(0)

    @property
    def up(self) -> Float[np.ndarray, "outputs rank"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """B, float32 ``[outputs, rank]``."""
        return self._formed(1)

    def _formed(self, side: int) -> np.ndarray:
        """A factor; forming it takes as many numbers as the module's weight has, and more.

        Raises:
            AdapterError: there are too many.
        """
        factor = self.factors[side]
        if math.prod(factor.shape) > MOST_FORMED:
            raise AdapterError(
                f"{shown(self.name)}: expected a factor of at most {MOST_FORMED} numbers, got a "
                f"product of {math.prod(factor.shape)}",
                "too-large",
            )
        return factor.form()


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One adapter read from a file.

    Attributes:
        modules: name -> module, in the file's order.
        source: the file it came from, or ``hub:`` with repository and file.
        sha256: hash of the file's bytes; empty where only a part was read.
        metadata: text of the file's header: claims, never read by a classifier.
        other_keys: tensors that are no part of an update, or of one that is not known: listed, not
            read.
        revision: Hub commit, or empty.

    Example:
        >>> from importlib.resources import files
        >>> from lora_ws import read_adapter
        >>> adapter = read_adapter(files("lora_ws") / "_assets/digit_testbed/seven.safetensors")
        >>> len(adapter.modules), sorted(adapter.components), adapter.flat().shape
        (70, ['unet'], (34944,))
    """

    modules: Mapping[str, Module]
    source: str
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    other_keys: tuple[str, ...] = ()
    revision: str = ""

    def __repr__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        methods = "/".join(sorted({module.method for module in self.modules.values()}))
        count = f"{len(self.modules)} modules of {', '.join(sorted(self.components))}"
        return f"Adapter({self.source}: {methods}, {count}, {rank})"

    @cached_property
    def linear(self) -> dict[str, Module]:
        """The denoiser's linear modules: what layouts and classifiers are about."""
        return {
            name: module
            for name, module in self.modules.items()
            if module.component in DENOISERS and not module.kernel
        }

    @cached_property
    def beyond_layout(self) -> tuple[str, ...]:
        """Modules of text encoders, convolutions, and tensors that were not read."""
        return (*(name for name in self.modules if name not in self.linear), *self.other_keys)

    @property
    def partly_read(self) -> bool:
        """Whether the file holds more than the modules here, which may change what it does."""
        return bool(self.other_keys)

    @cached_property
    def components(self) -> frozenset[str]:
        """What is adapted, such as ``unet`` and ``text_encoder``."""
        return frozenset(module.component for module in self.modules.values())

    @cached_property
    def layout(self) -> Layout:
        """Shapes and order of the denoiser's linear modules.

        Raises:
            AdapterError: it adapts none.
        """
        if not self.linear:
            raise AdapterError(
                f"{self.source}: adapts only {', '.join(sorted(self.components))}; expected linear "
                "modules of a U-Net or transformer",
                "foreign",
            )
        return Layout.from_layers(
            LayerSpec(name, m.inputs, m.outputs, m.rank) for name, m in self.linear.items()
        )

    def row(self, layout: Layout) -> Float[np.ndarray, " params"]:
        """Lay the denoiser's linear modules out as a row of a layout; see `lay_out`."""
        return lay_out(self.linear, layout)

    def flat(self) -> Float[np.ndarray, " params"]:
        """Factors in the adapter's own layout, with the scale folded into B: a row of `layout`."""
        return self.row(self.layout)


def check_finite(module: Module, file: str) -> None:
    """Refuse an update that float32 cannot hold, in its factors, its scale or their product.

    Args:
        module: of finite tensors, whose products need not be.
        file: what errors call it.

    Raises:
        AdapterError: reason ``not-finite``.

    Example:
        >>> large = np.full((1, 1), 1e30, np.float32)
        >>> check_finite(Module("unet", "to_v", "lora", large, large, 1.0, ""), "f")
        Traceback (most recent call last):
        lora_ws.errors.AdapterError: f: the update of `to_v` is beyond float32: ...
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # Each is at least as large as any number of the factors and of the product.
        norms = [_size(factor) for factor in module.factors]
        scale = abs(module.scale)
        sizes = *norms, scale, norms[1] * scale, norms[0] * norms[1] * scale
        if all(size <= FLOAT32_MAX for size in sizes):
            return
        norm = math.inf
        if not isinstance(module, ProductModule):
            factors = module.down, module.scaled_up, module.up
            if all(np.isfinite(values).all() for values in factors):
                norm = update_norm([(module.name, factors[0], factors[1], 1.0)])
    if not norm <= FLOAT32_MAX:
        raise AdapterError(
            f"{file}: the update of {shown(module.name)} is beyond float32: its matrices and scale "
            f"{module.scale:g} ({module.scale_source}) have a product that is not finite; the "
            "training went wrong, or the file is damaged",
            "not-finite",
        )


def _size(factor: Factor) -> float:
    """Norm of a factor, in float32: infinite or NaN where it is too large for that."""
    if isinstance(factor, KroneckerProduct):
        return _size(factor.first) * _size(factor.second)
    if isinstance(factor, PairProducts):
        sizes = (np.square(side).sum(axis=0) for side in (factor.first, factor.second))
        return math.sqrt(np.dot(*sizes))
    flat = factor.ravel()
    return math.sqrt(flat.dot(flat))


def lay_out(modules: Mapping[str, Module], layout: Layout) -> Float[np.ndarray, " params"]:
    """Lay modules out as the flat vector of a layout, with the scale folded into B.

    Args:
        modules: by the layout's names of layers; those that it lacks are left out.
        layout: which column is which number.

    Returns:
        float32 ``[layout.size]``, the update ``B @ A``; zeros for layers that have no module.

    Raises:
        LayoutError: a module is of another shape than its layer.

    Example:
        >>> layer = LayerSpec("to_v", 2, 1)
        >>> module = Module("unet", "to_v", "lora", np.ones((1, 2)), np.ones((1, 1)), 0.5, "")
        >>> lay_out({"to_v": module}, Layout.from_layers([layer])).tolist()
        [1.0, 1.0, 0.5]
    """
    row = np.empty(layout.size, np.float32)
    for layer, down, up in layout.pairs():
        module = modules.get(layer.name)
        if module is None:
            row[down] = row[up] = 0
            continue
        a, b = module.down, module.up
        if (a.shape, b.shape) != (layer.down_shape, layer.up_shape):
            raise LayoutError(
                f"layer `{layer.name}`: expected factors {layer.down_shape} and {layer.up_shape}, "
                f"got {a.shape} and {b.shape}; `project_adapter` brings an adapter into a layout "
                "of other ranks"
            )
        row[down] = a.ravel()
        np.multiply(b.ravel(), np.float32(module.scale), out=row[up])
    return row
