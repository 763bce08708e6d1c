"""`Regression`: a number."""

from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from jaxtyping import Float
from scipy.stats import kendalltau
from torch import Tensor

from lora_ws.collection import AdapterSet
from lora_ws.learn.tasks.base import Parts, Task

if TYPE_CHECKING:
    from lora_ws.learn.metrics import Measured


@final
class Regression(Task):
    """Predict a number: squared error, in squares of the spread of the training targets.

    Args:
        reduce: what stands for a row where the label is a column of lists, such as ``epoch_loss``:
            the last number, or the mean of all.

    Attributes:
        mean_: of the training targets.
        std_: their standard deviation, 1 where it is 0.

    Example:
        >>> Regression().fit(np.array([4.0, 8.0])).std_
        2.0
    """

    name = "regression"
    target = "number"
    quality = "mae"
    selects = "r2"
    needs_label = "a column of numbers"
    takes_regressors = True

    def __init__(self, *, reduce: Literal["last", "mean"] = "last") -> None:
        self.reduce: Literal["last", "mean"] = reduce

    def read(
        self, adapters: AdapterSet, label: str | None
    ) -> tuple[Float[np.ndarray, " adapters"], tuple[str, ...]]:
        """Read the number of each adapter."""
        return adapters.targets(label, self.reduce), ()

    def learn(self, targets: Float[np.ndarray, " rows"], classes: tuple[str, ...]) -> None:
        """Measure mean and standard deviation."""
        self.mean_ = float(targets.mean())
        self.std_ = float(targets.std()) or 1.0

    @property
    def outputs(self) -> int:
        """One, in standard deviations from the mean."""
        return 1

    def numbers(self, targets: Float[np.ndarray, " rows"]) -> Float[np.ndarray, "rows one"]:
        """Standard deviations from the mean."""
        return ((targets - self.mean_) / self.std_)[:, None]

    def loss(
        self,
        outputs: Float[Tensor, "*models rows outputs"],
        targets: Float[Tensor, "*models rows"],
        reduction: Literal["sum", "none"] = "sum",
    ) -> Float[Tensor, "..."]:
        """Squared error."""
        errors = ((self.predict(outputs) - targets) / self.std_).square()
        return errors if reduction == "none" else errors.sum()

    def predict(
        self, outputs: Float[Tensor, "*models rows outputs"]
    ) -> Float[Tensor, "*models rows"]:
        """Numbers in the targets' unit."""
        return outputs[..., 0] * self.std_ + self.mean_

    def score(
        self, outputs: Float[Tensor, "*models rows outputs"], targets: Float[Tensor, "*models rows"]
    ) -> Float[Tensor, "*models rows"]:
        """Absolute errors."""
        return (self.predict(outputs) - targets).abs()

    def measure(self, parts: Parts, part: str) -> "Measured":
        """Share of variance explained, mean errors, rank correlations (Kendall's is tau-b)."""
        from lora_ws.learn.metrics import computed, regression_metrics

        found = computed(regression_metrics(), *parts(part))
        kendall: Any = kendalltau(found.scores.numpy(), found.truth.numpy())[0]
        return found._replace(values={**found.values, "kendall": float(kendall)})
