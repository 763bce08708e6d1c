"""StatsFlatVec: a few summary statistics of the whole vector."""

from collections.abc import Sequence

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.featurizers.base import Featurizer, narrow
from lora_ws.functional.moments import STATISTICS, check_statistics, summary_statistics


class StatsFlatVec(Featurizer):
    """Mean, std, median, min, max, kurtosis and skew of all weights (paper section 4; 7 numbers).

    Args:
        statistics: which, and in which order; the paper's five at 50k are the first five.
        layout: which columns are which matrix; needed to choose some.
        matrices: names of the layers or matrices to read, ``*`` standing for anything (see
            `Layout.choose`); None reads all.

    Example:
        >>> StatsFlatVec().fit_transform(np.arange(12.0).reshape(2, 6)).shape
        (2, 7)
    """

    learns = False

    def __init__(
        self,
        *,
        statistics: Sequence[str] = STATISTICS,
        layout: Layout | None = None,
        matrices: Sequence[str] | None = None,
    ) -> None:
        self.statistics = statistics
        self.layout = layout
        self.matrices = matrices

    def _fit(self, rows: np.ndarray) -> None:
        self.statistics_ = check_statistics(self.statistics)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        return narrow(summary_statistics(rows, self.statistics_), rows.dtype)

    def _names(self) -> Sequence[str]:
        return self.statistics_
