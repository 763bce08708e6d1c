"""`Adapter`: what every file becomes: modules, each with two factors and an effective scale."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float

from lora_ws.adapters.keys import DENOISERS
from lora_ws.adapters.layout import LayerSpec, Layout
from lora_ws.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Module:
    """One adapted module; its update is ``scale * up @ down``.

    Attributes:
        component: ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2`` or ``_3``.
        path: dotted module path inside it, as diffusers spells it.
        method: ``lora``, ``locon``, ``tucker``, ``loha``, ``lokr`` or ``full``.
        down: A, float32 ``[rank, inputs]``; inputs of a convolution are channels times kernel.
        up: B, float32 ``[outputs, rank]``.
        scale: the factor that the file asks for.
        scale_source: where it is said.
        kernel: of a convolution.
        needs_base: DoRA: this is the update's direction; its size needs the base model.
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

    @property
    def name(self) -> str:
        """The path, with the component in front where that is not the denoiser."""
        return self.path if self.component in DENOISERS else f"{self.component}.{self.path}"

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.up.shape[1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter read from a file.

    Attributes:
        modules: name -> module, in the file's order.
        source: the file it came from, or ``hub:`` with repository and file.
        sha256: hash of the file's bytes; empty where only a part was read, or nobody says.
        metadata: text of the file's header: claims, never read by a classifier.
        other_keys: tensors that are no part of an update: listed, not read.
        revision: Hub commit, or empty.
    """

    modules: Mapping[str, Module]
    source: str
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    other_keys: tuple[str, ...] = ()
    revision: str = ""

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
            LayerSpec(name, m.down.shape[1], m.up.shape[0], m.rank)
            for name, m in self.linear.items()
        )

    def flat(self) -> Float[np.ndarray, " params"]:
        """Factors in layout order, with the scale folded into B so the update is ``B @ A``."""
        parts = []
        for layer in self.layout.layers:
            module = self.modules[layer.name]
            parts += [module.down.ravel(), (module.up * np.float32(module.scale)).ravel()]
        return np.concatenate(parts).astype(np.float32, copy=False)
