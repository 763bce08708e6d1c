"""StatsLayerDense: summary statistics of each layer's update B·A, which is never formed."""

from collections.abc import Sequence

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.featurizers.base import Featurizer, narrow
from lora_ws.functional.moments import STATISTICS, check_statistics
from lora_ws.functional.outer import outer_statistics

# Rows at a time: enough to amortise the call, few enough to stay in cache.
BLOCK_ROWS = 256


class StatsLayerDense(Featurizer):
    """Statistics of all entries of each layer's ``B @ A`` (paper section 4; 448 numbers on SD1.5).

    At rank 1 the product is never formed and the result is exact: moments in closed form, min, max
    and median those of the products rounded to the weights' precision.

    Args:
        layout: which columns are which matrix; needed, because a vector alone has no B and A.
        statistics: which, and in which order.
        matrices: names of the layers or matrices to read, ``*`` standing for anything (see
            `Layout.choose`); None reads all.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> StatsLayerDense(layout=layout).fit_transform(np.random.rand(2, layout.size)).shape
        (2, 448)
    """

    learns = False
    invariant = True

    def __init__(
        self,
        *,
        layout: Layout | None = None,
        statistics: Sequence[str] = STATISTICS,
        matrices: Sequence[str] | None = None,
    ) -> None:
        self.layout = layout
        self.statistics = statistics
        self.matrices = matrices

    def _fit(self, rows: np.ndarray) -> None:
        self._pairs()
        self.statistics_ = check_statistics(self.statistics)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        pairs, width = self._pairs(), len(self.statistics_)
        out = np.empty((len(rows), len(pairs) * width), rows.dtype)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            for k, (layer, down, up) in enumerate(pairs):
                values = outer_statistics(
                    block[:, down].reshape(-1, *layer.down_shape),
                    block[:, up].reshape(-1, *layer.up_shape),
                    self.statistics_,
                )
                out[start : start + BLOCK_ROWS, k * width : (k + 1) * width] = narrow(
                    values, rows.dtype
                )
        return out

    def _names(self) -> Sequence[str]:
        return [f"{layer.name}.{s}" for layer, _, _ in self._pairs() for s in self.statistics_]
