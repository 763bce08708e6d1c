"""StatsLayerDense: summary statistics of each layer's update B·A, which is never formed."""

from collections.abc import Sequence

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.errors import ConfigError
from lora_ws.featurizers.base import Featurizer, narrow
from lora_ws.functional.moments import STATISTICS, check_statistics
from lora_ws.functional.outer import outer_statistics

# Rows at a time: enough to amortise the call, few enough to stay in cache.
BLOCK_ROWS = 128


class StatsLayerDense(Featurizer):
    """Statistics of all entries of each layer's ``B @ A`` (paper section 4; 448 numbers on SD1.5).

    At rank 1 the product is never formed and the result is exact: moments in closed form, min, max
    and median those of the products rounded to the weights' precision.

    Args:
        layout: which columns are which matrix; needed, because a vector alone has no B and A.
        statistics: which, and in which order.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> StatsLayerDense(layout=layout).fit_transform(np.random.rand(2, layout.size)).shape
        (2, 448)
    """

    learns = False

    def __init__(
        self, *, layout: Layout | None = None, statistics: Sequence[str] = STATISTICS
    ) -> None:
        self.layout = layout
        self.statistics = statistics

    def _fit(self, rows: np.ndarray) -> None:
        if self.layout is None:
            raise ConfigError(
                "StatsLayerDense(layout=None): expected a layout, because only a layout tells "
                "which columns are B and A; pass layout=adapters.layout"
            )
        self.statistics_ = check_statistics(self.statistics)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        assert self.layout is not None  # checked in fit
        width = len(self.statistics_)
        out = np.empty((len(rows), len(self.layout.layers) * width), rows.dtype)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            for k, (layer, down, up) in enumerate(self.layout.pairs()):
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
        assert self.layout is not None
        return [f"{layer.name}.{s}" for layer in self.layout.layers for s in self.statistics_]
