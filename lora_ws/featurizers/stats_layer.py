"""StatsLayer: summary statistics of each factor of each layer."""

from collections.abc import Sequence
from math import prod

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.featurizers.base import Featurizer, narrow
from lora_ws.functional.moments import STATISTICS, check_statistics, summary_statistics

# Numbers copied at once.
BLOCK_VALUES = 1 << 22


class StatsLayer(Featurizer):
    """Statistics of every A and every B on its own (paper section 4; 896 numbers on SD1.5).

    Without a layout the whole row is one matrix, which makes it StatsFlatVec.

    Args:
        layout: which columns are which matrix.
        statistics: which, and in which order.
        matrices: names of the layers or matrices to read, ``*`` standing for anything (see
            `Layout.choose`); None reads all.

    Example:
        >>> layout = Layout.known("tiny_sd_qv")
        >>> StatsLayer(layout=layout).fit_transform(np.random.rand(2, layout.size)).shape
        (2, 896)
    """

    learns = False

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
        self.statistics_ = check_statistics(self.statistics)

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        selection = self._selection
        if selection is None:
            return narrow(summary_statistics(rows, self.statistics_), rows.dtype)
        # Matrices of one size together: a call for each would cost more than its statistics.
        sizes = np.array([m.columns.stop - m.columns.start for m in selection.matrices])
        groups = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
        out = np.empty((len(rows), len(sizes), len(self.statistics_)), rows.dtype)
        step = max(1, min(len(rows), BLOCK_VALUES // int(sizes.sum())))
        # One copy after the other in the same memory, which the system need not clear each time.
        room = np.empty(step * max(int(sizes[group].sum()) for group in groups), rows.dtype)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            for group in groups:
                shape = len(block), len(group), int(sizes[group[0]])
                stacked = room[: prod(shape)].reshape(shape)
                for k, member in enumerate(group):
                    stacked[:, k] = block[:, selection.matrices[member].columns]
                flat = stacked.reshape(-1, shape[2])
                found = summary_statistics(flat, self.statistics_, overwrite_input=True)
                found = narrow(found, rows.dtype).reshape(*shape[:2], -1)
                out[start : start + step, group] = found
        return out.reshape(len(rows), out.shape[1] * out.shape[2])

    def _names(self) -> Sequence[str]:
        selection = self._selection
        if selection is None:
            return self.statistics_
        return [f"{m.name}.{s}" for m in selection.matrices for s in self.statistics_]
