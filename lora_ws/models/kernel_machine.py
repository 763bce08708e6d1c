"""A support vector machine as tensors: a kernel with some vectors, one classifier per pair."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, final

import numpy as np

from lora_ws.errors import ConfigError
from lora_ws.functional.scores import LINEAR, Kernel, check_state, kernel_values, pair_scores
from lora_ws.models.base import Metanetwork, Outputs, scaled, scaler_shapes
from lora_ws.models.inputs import InputSpec

if TYPE_CHECKING:
    from lora_ws.models.kernel_machine_module import KernelMachineModule


@final
class KernelMachine(Metanetwork):
    """One-vs-one classifiers on a kernel, combined into a score per class as scikit-learn does.

    Tensors alone, to be filled by a fitted ``SVC`` (see `lora_ws.models.estimators`); gradient
    descent has nothing to train here.

    Args:
        kernel: of the normalized row x with each vector v: ``linear``, x·v; ``poly``,
            (gamma x·v + coef0)^degree; ``rbf``, exp(-gamma |x - v|²); ``sigmoid``,
            tanh(gamma x·v + coef0); or ``precomputed``: rows are kernel values, not normalized.
        gamma: scale of the kernel.
        coef0: what poly and sigmoid add.
        degree: of poly.
        vectors: how many; unused where the kernel is linear or precomputed.

    Example:
        >>> import torch
        >>> machine = KernelMachine(kernel="rbf", gamma=0.1, vectors=5)
        >>> machine.build(InputSpec(7), outputs=3)(torch.zeros(2, 7)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        *,
        kernel: Kernel = "rbf",
        gamma: float = 1.0,
        coef0: float = 0.0,
        degree: int = 3,
        vectors: int = 0,
    ) -> None:
        self.kernel: Kernel = kernel
        self.gamma = gamma
        self.coef0 = coef0
        self.degree = degree
        self.vectors = vectors

    def build(self, inputs: InputSpec, outputs: int) -> "KernelMachineModule":
        """Make the network, of zeros.

        Raises:
            ConfigError: a kernel that needs vectors has none, or there is a single class.
        """
        self._check(outputs)
        from lora_ws.models.kernel_machine_module import KernelMachineModule

        return KernelMachineModule(self, inputs, outputs)

    def in_numpy(
        self, inputs: InputSpec, outputs: int, state: Mapping[str, np.ndarray]
    ) -> Outputs | None:
        """Compare the rows with the vectors, and have each pair of classes vote, in float64."""
        self._check(outputs)
        pairs, linear = outputs * (outputs - 1) // 2, self.kernel in LINEAR
        terms = inputs.width if linear else self.vectors
        shapes = {} if self.kernel == "precomputed" else scaler_shapes(inputs)
        shapes |= {"vectors": (0 if linear else terms, inputs.width)}
        check_state(state, shapes | {"weight": (pairs, terms), "bias": (pairs,)})

        def score(rows: np.ndarray) -> np.ndarray:
            rows = rows.astype(np.float64)
            rows = rows if self.kernel == "precomputed" else scaled(rows, state)
            own = self.gamma, self.coef0, self.degree
            values = kernel_values(rows, state["vectors"], self.kernel, *own)
            margins = values @ state["weight"].T + state["bias"]
            return pair_scores(margins, outputs)

        return score

    def _check(self, outputs: int) -> None:
        if self.kernel not in LINEAR and self.vectors < 1:
            raise ConfigError(
                f"KernelMachine(kernel={self.kernel!r}, vectors={self.vectors}): expected at "
                "least 1 vector; it is what a fitted SVC becomes (--model sklearn.svm.SVC)"
            )
        if outputs < 2:
            raise ConfigError(f"KernelMachine: expected at least 2 classes, got {outputs}")
