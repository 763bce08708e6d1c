"""FlatVec: the weights themselves."""

from collections.abc import Sequence

import numpy as np

from lora_ws.adapters.layout import Layout
from lora_ws.featurizers.base import Featurizer


class FlatVec(Featurizer):
    """All factors of an adapter, one long vector (paper section 4; 99 648 numbers on SD1.5).

    A memory map is returned as it is, nothing is copied.

    Args:
        layout: names the columns; without one they are numbered.
        matrices: names of the layers or matrices to read, ``*`` standing for anything (see
            `Layout.choose`); None reads all.

    Example:
        >>> FlatVec().fit_transform(np.eye(2)).shape
        (2, 2)
    """

    learns = False
    reads = False

    def __init__(
        self, *, layout: Layout | None = None, matrices: Sequence[str] | None = None
    ) -> None:
        self.layout = layout
        self.matrices = matrices

    def _fit(self, rows: np.ndarray) -> None:
        self.n_features_out_ = rows.shape[1]

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def _names(self) -> Sequence[str]:
        selection = self._selection
        if selection is None:
            return [f"param{k}" for k in range(self.n_features_out_)]
        return [
            f"{matrix.name}[{row},{column}]"
            for matrix in selection.matrices
            for row, column in np.ndindex(matrix.shape)
        ]
