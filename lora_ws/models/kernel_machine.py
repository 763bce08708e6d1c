"""A support vector machine as tensors: a kernel with some vectors, one classifier per pair."""

from itertools import combinations
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.errors import ConfigError
from lora_ws.models.base import InputSpec, Metanetwork
from lora_ws.models.fitted import FittedModule, Identity

Kernel = Literal["linear", "poly", "rbf", "sigmoid", "precomputed"]
# Kernels whose machine is linear in the row, so that no vectors are needed.
LINEAR = ("linear", "precomputed")


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
        self.kernel = kernel
        self.gamma = gamma
        self.coef0 = coef0
        self.degree = degree
        self.vectors = vectors

    def build(self, inputs: InputSpec, outputs: int) -> "KernelMachineModule":
        """Make the network, of zeros.

        Raises:
            ConfigError: a kernel that needs vectors has none, or there is a single class.
        """
        if self.kernel not in LINEAR and self.vectors < 1:
            raise ConfigError(
                f"KernelMachine(kernel={self.kernel!r}, vectors={self.vectors}): expected at "
                "least 1 vector; it is what a fitted SVC becomes (--model sklearn.svm.SVC)"
            )
        if outputs < 2:
            raise ConfigError(f"KernelMachine: expected at least 2 classes, got {outputs}")
        return KernelMachineModule(self, inputs, outputs)


@final
class KernelMachineModule(FittedModule):
    """What `KernelMachine` builds.

    Attributes:
        vectors: normalized rows ``[vectors, features]``; none where the kernel is linear.
        weight: coefficient of each vector (of each feature where the kernel is linear) in the
            classifier of each pair of classes, positive for the first ``[pairs, vectors]``.
        bias: of each pair ``[pairs]``.
    """

    vectors: Tensor
    weight: Tensor
    bias: Tensor
    _first: Tensor
    _second: Tensor

    def __init__(self, network: KernelMachine, inputs: InputSpec, outputs: int) -> None:
        super().__init__(network, inputs)
        self.options = network
        if network.kernel == "precomputed":
            self.normalizer = Identity()
        linear = network.kernel in LINEAR
        pairs = list(combinations(range(outputs), 2))
        terms = inputs.width if linear else network.vectors
        self.register_buffer("vectors", torch.zeros(0 if linear else terms, inputs.width))
        self.register_buffer("weight", torch.zeros(len(pairs), terms))
        self.register_buffer("bias", torch.zeros(len(pairs)))
        # Which class of each pair is which, as 0 and 1 [pairs, classes].
        for name, side in zip(("_first", "_second"), zip(*pairs, strict=True), strict=True):
            self.register_buffer(name, torch.eye(outputs)[list(side)], persistent=False)

    def score(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows classes"]:
        """Votes of the pairs, ties broken by their margins; of two classes, half the margin each.

        Votes and summed margins go together as in scikit-learn's ``decision_function`` with
        ``decision_function_shape="ovr"``: the class with the highest score is what ``predict``
        returns with ``break_ties=True``.
        """
        margins = self.margins(rows)
        sides = self._first - self._second
        if len(sides) == 1:
            return margins @ sides / 2
        second = (margins < 0).to(margins.dtype)
        votes = (1 - second) @ self._first + second @ self._second
        sums = margins @ sides
        return votes + sums / (3 * (sums.abs() + 1))

    def margins(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows pairs"]:
        """How far each pair's classifier decides for its first class."""
        return self._terms(rows) @ self.weight.T + self.bias

    def _terms(self, rows: Tensor) -> Tensor:
        own = self.options
        if own.kernel in LINEAR:
            return rows
        if own.kernel == "rbf":
            # The faster way through inner products cancels where rows are near.
            exact = "donot_use_mm_for_euclid_dist"
            distances = torch.cdist(rows, self.vectors, compute_mode=exact)
            return torch.exp(-own.gamma * distances.square())
        products = own.gamma * rows @ self.vectors.T + own.coef0
        return products.tanh() if own.kernel == "sigmoid" else products**own.degree
