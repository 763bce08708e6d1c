"""`Metanetwork`: the seam for networks that read adapters.

A metanetwork is a spec: its constructor only stores, so that its class path and arguments are the
YAML, the flags and what a bundle keeps. ``build`` makes the torch module, which maps rows to
outputs in two steps, ``embed`` and ``head``. Nothing here needs torch before that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lora_ws.models.inputs import InputSpec
from lora_ws.parameters import Parametrized

if TYPE_CHECKING:
    from lora_ws.models.many import Stacked
    from lora_ws.models.module import MetanetModule
    from lora_ws.models.normalizers import Normalizer

Symmetry = Literal["gl", "sign", "scale", "negation"]
# Outputs ``[rows, outputs]`` of raw rows ``[rows, params]``.
Outputs = Callable[[np.ndarray], np.ndarray]


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
    def build(self, inputs: InputSpec, outputs: int) -> "MetanetModule":
        """Make the network; its initial weights come from torch's global generator.

        Args:
            inputs: what its rows are.
            outputs: classes, or 1 for a number.
        """

    def normalizer(self, inputs: InputSpec) -> "Normalizer":
        """What its modules do to raw rows first, not fitted yet.

        Args:
            inputs: what the rows are.
        """
        from lora_ws.models.module import normalizer_for

        return normalizer_for(inputs)

    def stack(self, modules: Sequence["MetanetModule"]) -> "Stacked":
        """Equal networks as one, for the batched engine; `torch.vmap` unless overridden."""
        from lora_ws.models.many import ManyModules

        return ManyModules(modules)

    def in_numpy(
        self, inputs: InputSpec, outputs: int, state: Mapping[str, np.ndarray]
    ) -> Outputs | None:
        """What its module makes of rows, without torch; None where torch is needed.

        Of networks whose embedding is the row itself, so that a verdict need not load torch.

        Args:
            inputs: what the rows are.
            outputs: as for ``build``.
            state: of the module, by name.

        Raises:
            ValueError: the state is of another module.
        """
        _ = inputs, outputs, state
        return None


def is_invariant(reader: Any) -> bool:
    """Whether a featurizer or network depends on updates alone, not on their split into B and A."""
    return bool(getattr(reader, "invariant", False)) or "gl" in getattr(reader, "symmetries", ())


def scaler_shapes(inputs: InputSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of what a module of features scales its columns by, by name in its state."""
    return {"normalizer.mean": (inputs.width,), "normalizer.scale": (inputs.width,)}


def scaled(rows: np.ndarray, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows as a module of features scales them."""
    return (rows - state["normalizer.mean"]) / state["normalizer.scale"]
