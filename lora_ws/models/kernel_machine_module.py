"""What `KernelMachine` builds."""

from itertools import combinations
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.functional.scores import LINEAR
from lora_ws.models.base import Metanetwork
from lora_ws.models.fitted import FittedModule, Identity
from lora_ws.models.inputs import InputSpec


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

    def __init__(self, network: Metanetwork, inputs: InputSpec, outputs: int) -> None:
        super().__init__(network, inputs)
        self.options: Any = network
        if self.options.kernel == "precomputed":
            self.normalizer = Identity()
        linear = self.options.kernel in LINEAR
        pairs = list(combinations(range(outputs), 2))
        terms = inputs.width if linear else self.options.vectors
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
