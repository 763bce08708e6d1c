"""`Metanetwork`: the seam for networks that read adapters; `MetanetModule`: what it builds.

A metanetwork is a spec: its constructor only stores, so that its class path and arguments are the
YAML, the flags and what a bundle keeps. ``build`` makes the torch module, which maps rows to
outputs in two steps, ``embed`` and ``head``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, final

from jaxtyping import Float
from torch import Tensor, nn

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.models.many import ManyModules, Stacked
from lora_ws.models.normalizers import ColumnScaler, Normalizer, UpdateScaler
from lora_ws.parameters import Parametrized

Symmetry = Literal["gl", "sign", "scale", "negation"]


class InputSpec(NamedTuple):
    """What a network is given: rows of so many numbers, and what they mean.

    Attributes:
        width: numbers per row.
        layout: which columns are which factor, where the network reads factors; else None.

    Example:
        >>> InputSpec(896).layout is None
        True
    """

    width: int
    layout: Layout | None = None

    @classmethod
    def of(cls, layout: Layout) -> "InputSpec":
        """The input of a network that reads the factors of a layout.

        Example:
            >>> InputSpec.of(Layout.known("tiny_sd_qv")).width
            7072
        """
        return cls(layout.size, layout)

    @property
    def factors(self) -> Layout:
        """The layout.

        Raises:
            ConfigError: the rows are features, whose columns are no factors.
        """
        if self.layout is None:
            raise ConfigError(
                "InputSpec: expected a layout for a network that reads factors, got features; "
                "use InputSpec.of(layout)"
            )
        return self.layout


class MetanetModule(nn.Module, ABC):
    """A network on rows: features ``[adapters, features]`` or weights ``[adapters, params]``.

    Args:
        inputs: what the rows are.

    Attributes:
        normalizer: what the network does to raw rows first. Its constants are fitted on training
            rows, shared by all seeds, and travel in the bundle.

    Example:
        >>> import torch
        >>> from lora_ws.models import MLP
        >>> MLP(hidden=(16,)).build(InputSpec(7), outputs=10)(torch.zeros(2, 7)).shape
        torch.Size([2, 10])
    """

    normalizer: Normalizer

    def __init__(self, inputs: InputSpec) -> None:
        super().__init__()
        self.normalizer = normalizer_for(inputs)

    @abstractmethod
    def embed(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters width"]:
        """Embed raw rows; abstention and maps of adapters look at these vectors."""

    @abstractmethod
    def head(self, embedding: Float[Tensor, "adapters width"]) -> Float[Tensor, "adapters outputs"]:
        """Map embeddings to outputs: logits, or standardised numbers."""

    @final
    def forward(self, rows: Float[Tensor, "adapters params"]) -> Float[Tensor, "adapters outputs"]:
        """Return outputs for raw rows."""
        return self.head(self.embed(rows))


class Metanetwork(Parametrized, ABC):
    """A network for adapters, as data; constructors are keyword-only and only store.

    Attributes:
        reads: ``features`` of a featurizer, or the ``factors`` themselves.
        symmetries: under what the outputs stay the same: ``gl`` (``B @ G, inv(G) @ A`` for any
            invertible G), ``sign`` (G of signs), ``scale`` (the update times a positive number),
            ``negation`` (the update times -1: a slider reads as its inverse).

    Example:
        >>> from lora_ws.models import DeepSets
        >>> DeepSets().reads, sorted(DeepSets().symmetries)
        ('factors', ['gl', 'negation', 'sign'])
    """

    reads: ClassVar[Literal["features", "factors"]] = "features"
    symmetries: ClassVar[frozenset[Symmetry]] = frozenset()

    @abstractmethod
    def build(self, inputs: InputSpec, outputs: int) -> MetanetModule:
        """Make the network; its initial weights come from torch's global generator.

        Args:
            inputs: what its rows are.
            outputs: classes, or 1 for a number.
        """

    def normalizer(self, inputs: InputSpec) -> Normalizer:
        """What its modules do to raw rows first, not fitted yet.

        Args:
            inputs: what the rows are.
        """
        return normalizer_for(inputs)

    def stack(self, modules: Sequence[MetanetModule]) -> "Stacked":
        """Equal networks as one, for the batched engine; `torch.vmap` unless overridden."""
        return ManyModules(modules)


def normalizer_for(inputs: InputSpec) -> Normalizer:
    """Scale the columns of features; of factors, the update of each layer."""
    if inputs.layout is None:
        return ColumnScaler(inputs.width)
    return UpdateScaler(inputs.layout)


def is_invariant(reader: Any) -> bool:
    """Whether a featurizer or network depends on updates alone, not on their split into B and A."""
    return bool(getattr(reader, "invariant", False)) or "gl" in getattr(reader, "symmetries", ())
